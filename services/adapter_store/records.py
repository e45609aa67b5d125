"""What the store keeps about adapters; plain values that every index backend reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.adapter_store.findings import Finding
from services.common.references import AdapterName
from services.common.split import Target


@dataclass(frozen=True, slots=True)
class Overrides:
    """What an uploader takes upon himself; part of the content digest, as the same bytes mean something else with it.

    force_base: accept a `base_model_name_or_path` that the profile does not know
    allow_zero: accept an adapter that changes nothing
    allow_changed_base: accept an `init_lora_weights` that assumes changed base weights
    """

    force_base: bool = False
    allow_zero: bool = False
    allow_changed_base: bool = False


@dataclass(frozen=True, slots=True)
class UploadHeader:
    """What an upload is. promote: move `stable` to it."""

    adapter: AdapterName
    base_model: str
    overrides: Overrides = Overrides()
    promote: bool = False


@dataclass(frozen=True, slots=True)
class BoundModule:
    """One linear that a version adapts."""

    name: str
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class VersionContent:
    """What registration makes of an upload. Digests are `sha256:` and 64 hex digits; pack_size is in bytes.

    dtype: the widest storage type among its modules
    modules: empty where a list of versions is read, as lists do not show them
    weights_header_digest: of the weights' header, when the rest of their bytes is kept in the pack alone; empty when
        the weights are a blob of their own
    """

    content_digest: str
    config_digest: str
    weights_digest: str
    pack_digest: str
    pack_size: int
    base_model: str
    max_rank: int
    parameters: int
    dtype: str
    warnings: tuple[str, ...]
    modules: tuple[BoundModule, ...] = ()
    weights_header_digest: str = ""


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version as the index knows it. created_ns: nanoseconds since 1970.

    deleted: no name means it any more; it can be brought back until it is collected
    collected: its bytes are given up, and it stays deleted
    """

    adapter: AdapterName
    number: int
    created_ns: int
    deleted: bool
    aliases: tuple[str, ...]
    content: VersionContent
    collected: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """One named line of versions. latest_version is 0 when all are deleted; base_model is the newest's.

    revision: entries in its log; changes with every change of the adapter
    """

    name: AdapterName
    aliases: Mapping[str, tuple[Target, ...]]
    latest_version: int
    num_versions: int
    base_model: str
    revision: int


@dataclass(frozen=True, slots=True)
class Registered:
    """The answer to a registration."""

    version: Version
    existed: bool


@dataclass(frozen=True, slots=True)
class Validated:
    """The answer to a dry run. modules: those that are sound; the upload would be taken when there are no findings."""

    findings: tuple[Finding, ...]
    modules: tuple[BoundModule, ...]
    warnings: tuple[str, ...]
    content_digest: str
