"""From an upload to a version: check, pack, commit the blobs, then one entry in the adapter's log."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from services.adapter_store import refusals
from services.adapter_store.blobs.interface import Blobs, PartialBlob
from services.adapter_store.catalog import Catalog, version_record
from services.adapter_store.collection import BLOB_GRACE_SECONDS
from services.adapter_store.journal import Folded, Journal
from services.adapter_store.log.entry import AliasSet, Body, VersionAdded
from services.adapter_store.log.fold import AdapterState
from services.adapter_store.quota import Quota
from services.adapter_store.records import BoundModule, Overrides, Registered, UploadHeader, Validated, VersionContent
from services.adapter_store.steps import commit_step
from services.adapter_store.streams import adapter_stream
from services.adapter_store.upload import Upload
from services.adapter_store.uri import UriRoots
from services.common.packed import ITEM_SIZES, PackedHeader
from services.common.profile import BaseModelProfile
from services.common.references import STABLE
from services.common.split import Target

if TYPE_CHECKING:
    from services.adapter_store.streaming import WeightsStream
    from services.adapter_store.validation import Examined

# An entry is appended well within the grace of its blobs.
_RENEW_AFTER_NS = int(BLOB_GRACE_SECONDS * 1e9) // 2

log = logging.getLogger(__name__)


class Registration:
    def __init__(
        self, blobs: Blobs, journal: Journal, catalog: Catalog, *, max_upload_bytes: int, uri_roots: UriRoots
    ) -> None:
        self._blobs = blobs
        self._journal = journal
        self._catalog = catalog
        self._max_upload_bytes = max_upload_bytes
        self._uri_roots = uri_roots

    def begin_upload(self, header: UploadHeader, quota: Quota | None = None) -> Upload:
        """A place for the files to come. Raises NotFound, AlreadyExists and, with a quota that is used up,
        ResourceExhausted before any of them has."""
        profile = self._catalog.profile(header.base_model)
        self._check_name(header)
        if quota is not None:
            quota.check(self._catalog.usage(quota.tenant), new_adapter=False, more_bytes=1)
        return Upload(self._blobs, self._max_upload_bytes, partial(self._open_stream, profile, header.overrides))

    def register(
        self, header: UploadHeader, upload: Upload, *, actor: str = "", quota: Quota | None = None
    ) -> Registered:
        """Check, pack and keep an upload; it is discarded on every way out.

        Identical content of this adapter is answered with the version that exists, unless that was deleted.
        Raises InvalidArgument and FailedPrecondition that carry every finding, ResourceExhausted beyond the quota.
        """
        with upload, contextlib.ExitStack() as staged:
            upload.check_complete()
            profile = self._catalog.profile(header.base_model)
            digest = _upload_digest(header, upload, profile)
            content: VersionContent | None = None
            kept: _Staged | None = None
            existed = False
            began = 0

            def decide(folded: Folded) -> Body | None:
                nonlocal content, kept, existed, began
                assert isinstance(folded.state, AdapterState)
                known = folded.state.with_content(digest)
                existed = known is not None
                if known is not None:
                    return _promotion(folded.state, known) if header.promote else None
                if folded.seq == 0:
                    self._check_name(header)
                if content is None:
                    if quota is not None:
                        used, more = self._catalog.usage(quota.tenant), upload.weights_size
                        quota.check(used, new_adapter=folded.seq == 0, more_bytes=more)
                    began = self._journal.clock()
                    kept = self._stage(upload, staged)
                    content = self._commit(header, profile, upload, kept, digest)
                number = len(folded.state.versions) + 1
                return VersionAdded(number, content, stable=header.promote or number == 1)

            folded = self._journal.commit(adapter_stream(header.adapter), decide, actor=actor)
            if kept is not None and self._journal.clock() - began > _RENEW_AFTER_NS:
                # the clock jumped, or all took long: a collection may have found the blobs old, and no entry yet
                for blob in kept:
                    blob.commit()
        assert isinstance(folded.state, AdapterState)
        number = folded.state.with_content(digest)
        assert number is not None
        log.info("registered %s@%d digest=%s existed=%s", header.adapter, number, digest, existed)
        if existed or content is None:
            return Registered(self._catalog.version(header.adapter, number), existed=True)
        return Registered(version_record(header.adapter, folded.state, number, content), existed=False)

    def register_from_uri(self, header: UploadHeader, uri: str, *, actor: str = "") -> Registered:
        """As `register`, from a place beneath one of the roots."""
        with self.begin_upload(header) as upload:
            self._uri_roots.copy(uri, upload)
            return self.register(header, upload, actor=actor)

    def validate(self, header: UploadHeader, upload: Upload) -> Validated:
        """What `register` would find, as data; nothing is kept. Raises InvalidArgument when a file is missing."""
        with upload:
            upload.check_complete()
            profile = self._catalog.profile(header.base_model)
            found = _examine(header, upload, profile)
            return Validated(
                findings=tuple(found.findings),
                modules=tuple(BoundModule(module.name, module.rank, module.scale) for module in found.modules),
                warnings=found.warnings,
                content_digest=_upload_digest(header, upload, profile),
            )

    def _check_name(self, header: UploadHeader) -> None:
        if self._catalog.base_model(header.adapter.name) is not None:
            raise refusals.named_like_base_model(header.adapter)

    def _stage(self, upload: Upload, staged: contextlib.ExitStack) -> _Staged:
        """The blobs to commit, of which `staged` discards what the upload does not."""
        other = staged.enter_context(self._blobs.create())
        if upload.stream is None:
            return _Staged(upload.config, upload.weights, packed=other)
        other.write(upload.stream.header)
        return _Staged(upload.config, other, packed=upload.stream.packed)

    def _open_stream(
        self, profile: BaseModelProfile, overrides: Overrides, config: bytes, weights_header: bytes
    ) -> WeightsStream | None:
        """A way into a pack for weights that one will hold whole, as far as can be told before they have come."""
        # numpy comes with these: 0.1 s and 15 MiB that a store which only resolves and serves never needs
        from services.adapter_store.streaming import WeightsStream
        from services.adapter_store.validation import examine_structure

        structure = examine_structure(config, memoryview(weights_header), profile, overrides, is_whole=False)
        if not structure.packs_whole:
            return None
        return WeightsStream(weights_header, structure, self._blobs.create(), base_model=profile.name)

    def _commit(
        self, header: UploadHeader, profile: BaseModelProfile, upload: Upload, staged: _Staged, digest: str
    ) -> VersionContent:
        """Validate, pack, and commit the three blobs; nothing is committed unless all of it went well."""
        examined = _examine(header, upload, profile)
        examined.findings.raise_if_any()
        contents = _finish_pack(upload, examined, staged.packed, digest, profile)
        with ThreadPoolExecutor(1, "commit") as beside:
            synced = beside.submit(_sync, staged.weights, staged.packed)  # while it is hashed
            content = VersionContent(
                content_digest=digest,
                config_digest=staged.config.digest,
                weights_digest=upload.weights_digest,
                weights_header_digest="" if upload.stream is None else staged.weights.digest,
                pack_size=staged.packed.size,
                pack_digest=staged.packed.digest,
                base_model=profile.name,
                max_rank=contents.max_rank,
                parameters=sum(module.rank * (module.in_features + module.out_features) for module in contents.modules),
                dtype=max((module.dtype for module in contents.modules), key=lambda dtype: (ITEM_SIZES[dtype], dtype)),
                warnings=examined.warnings,
                modules=tuple(BoundModule(module.name, module.rank, module.scale) for module in contents.modules),
            )
            synced.result()
            staged.config.commit(keep=True)
            commit_step("register.config")
            committed = beside.submit(staged.weights.commit, keep=True)  # the disk, or S3, takes both at once
            staged.packed.commit(keep=True)
            commit_step("register.pack")
            committed.result()
            commit_step("register.weights")
        return content


def _sync(*blobs: PartialBlob) -> None:
    for blob in blobs:
        blob.sync()


class _Staged(NamedTuple):
    """The blobs of a version. weights: all of them, or their header if the pack has the rest."""

    config: PartialBlob
    weights: PartialBlob
    packed: PartialBlob


def _examine(header: UploadHeader, upload: Upload, profile: BaseModelProfile) -> Examined:
    from services.adapter_store.validation import examine

    if upload.stream is not None:
        return upload.stream.examine()
    return examine(upload.config.read(), upload.weights.map(), profile, header.overrides)


def _finish_pack(
    upload: Upload, examined: Examined, packed: PartialBlob, digest: str, profile: BaseModelProfile
) -> PackedHeader:
    from services.adapter_store.packing import pack

    if upload.stream is not None:
        return upload.stream.finish(digest)
    weights = upload.weights.map()
    return pack(examined.modules, weights, content_digest=digest, base_model=profile.name, write_at=packed.write_at)


def content_digest(config_digest: str, weights_digest: str, base_model: str, overrides: Overrides) -> str:
    """A version's identity. Overrides count only when set, so that adding one later changes no digest."""
    identity = {
        "config": config_digest,
        "weights": weights_digest,
        "base_model": base_model,
        "overrides": sorted(name for name, is_set in asdict(overrides).items() if is_set),
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def _upload_digest(header: UploadHeader, upload: Upload, profile: BaseModelProfile) -> str:
    return content_digest(upload.config.digest, upload.weights_digest, profile.name, header.overrides)


def _promotion(state: AdapterState, number: int) -> Body | None:
    targets = (Target(number),)
    return None if state.aliases.get(STABLE) == targets else AliasSet(STABLE, targets)
