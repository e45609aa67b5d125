"""The adapter store: registers versions, says what names mean, and hands out packed bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from services.adapter_store import refusals
from services.adapter_store.blobs.disk import BlobReader, DiskBlobs
from services.adapter_store.findings import shown
from services.adapter_store.index.sqlite import SqliteIndex
from services.adapter_store.records import (
    Adapter,
    BoundModule,
    Counts,
    Overrides,
    Registered,
    UploadHeader,
    Version,
    VersionContent,
)
from services.adapter_store.upload import Upload
from services.adapter_store.uri import copy_from_uri
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.common.packed import ITEM_SIZES
from services.common.profile import BaseModelProfile
from services.common.references import LATEST, AdapterName, AdapterReference, check_name, parse_name

DEFAULT_PAGE = 100
MAX_PAGE = 1000

log = logging.getLogger(__name__)


class AdapterStore:
    """One store over its blobs and index. Every method may block on the disk; all are safe in several threads."""

    def __init__(
        self, blobs: DiskBlobs, index: SqliteIndex, *, max_upload_bytes: int, uri_roots: Sequence[Path] = ()
    ) -> None:
        self._blobs = blobs
        self._index = index
        self._max_upload_bytes = max_upload_bytes
        self._uri_roots = tuple(root.resolve() for root in uri_roots)

    def close(self) -> None:
        self._index.close()
        self._blobs.close()

    def register_base_model(self, profile: BaseModelProfile) -> bool:
        """True when the same profile was there. Raises AlreadyExists."""
        existed = self._index.add_base_model(profile)
        log.info("base model %s registered, existed=%s", profile.name, existed)
        return existed

    def base_models(self) -> list[BaseModelProfile]:
        return self._index.base_models()

    def begin_upload(self, header: UploadHeader) -> Upload:
        """A place for the files to come. Raises NotFound and AlreadyExists before any of them has."""
        self._profile(header.base_model)
        if self._index.base_model(header.adapter.name) is not None:
            raise refusals.named_like_base_model(header.adapter)
        return Upload(self._blobs, self._max_upload_bytes)

    def register(self, header: UploadHeader, upload: Upload) -> Registered:
        """Check, pack and keep an upload; it is discarded on every way out.

        Identical content of this adapter is answered with the version that exists, unless that was deleted.
        Raises InvalidArgument and FailedPrecondition that carry every finding.
        """
        with upload:
            upload.check_complete()
            profile = self._profile(header.base_model)
            digest = content_digest(upload.config.digest, upload.weights.digest, profile.name, header.overrides)
            known = self._index.find_content(header.adapter, digest)
            content = known.content if known is not None else self._commit(header, profile, upload, digest)
        registered = self._index.publish(header.adapter, content, promote=header.promote, created_ns=time.time_ns())
        log.info(
            "registered %s@%d digest=%s existed=%s",
            header.adapter,
            registered.version.number,
            digest,
            registered.existed,
        )
        return registered

    def register_from_uri(self, header: UploadHeader, uri: str) -> Registered:
        """As `register`, from a directory beneath one of the roots."""
        with self.begin_upload(header) as upload:
            copy_from_uri(uri, self._uri_roots, upload)
            return self.register(header, upload)

    def resolve(self, reference: AdapterReference, base_model: str) -> Version:
        """The version a reference means. Raises NotFound, and FailedPrecondition when it is of another base model."""
        version = self._index.resolve(reference)
        if base_model and version.content.base_model != base_model:
            raise FailedPrecondition(
                "BASE_MODEL_MISMATCH",
                f"{version.adapter}@{version.number} is of base model {version.content.base_model}, not of "
                f"{shown(base_model)}; ask a replica that serves that model",
                field="base_model",
                base_model=version.content.base_model,
            )
        return version

    def open_pack(self, digest: str, offset: int) -> BlobReader:
        """Packed bytes by their digest. Those of a deleted version stay readable for requests that resolved it before.

        Raises InvalidArgument and NotFound.
        """
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            raise InvalidArgument(
                "INVALID_DIGEST", f"digest: {shown(digest)} is no 'sha256:' and 64 hex digits", field="digest"
            )
        if not self._index.has_pack(digest):
            raise NotFound("PACK_NOT_FOUND", f"no version has pack digest {digest}; resolve the adapter again")
        reader = self._blobs.open(digest)
        if offset > reader.size:
            reader.close()
            raise InvalidArgument(
                "OFFSET_OUT_OF_RANGE", f"offset: {offset} is beyond the {reader.size} bytes there are", field="offset"
            )
        return reader

    def adapter(self, name: AdapterName) -> Adapter:
        return self._index.adapter(name)

    def adapters(self, tenant: str, page_size: int, page_token: str) -> tuple[list[Adapter], str]:
        """A page by name, and the token of the next; the token is the last name of the page."""
        if tenant:
            check_name(tenant, field="tenant", what="tenant")
        after = parse_name(page_token, field="page_token") if page_token else None
        limit = _page_limit(page_size)
        found = self._index.adapters(tenant=tenant, after=after, limit=limit + 1)
        return found[:limit], str(found[limit - 1].name) if len(found) > limit else ""

    def version(self, adapter: AdapterName, number: int) -> Version:
        return self._index.version(adapter, number)

    def versions(
        self, adapter: AdapterName, *, include_deleted: bool, page_size: int, page_token: str
    ) -> tuple[list[Version], str]:
        """A page, newest first, and the token of the next; the token is the last number of the page."""
        if page_token and not re.fullmatch(r"[1-9][0-9]{0,17}", page_token):
            raise InvalidArgument(
                "INVALID_PAGE_TOKEN", f"page_token: {shown(page_token)} is none of ours", field="page_token"
            )
        limit = _page_limit(page_size)
        before = int(page_token) if page_token else None
        found = self._index.versions(adapter, before=before, limit=limit + 1, include_deleted=include_deleted)
        return found[:limit], str(found[limit - 1].number) if len(found) > limit else ""

    def set_alias(self, adapter: AdapterName, alias: str, number: int) -> Adapter:
        """Point an alias at a version. Raises InvalidArgument for `latest` and for a name that looks like a version."""
        check_name(alias, field="alias", what="alias")
        if alias == LATEST:
            raise InvalidArgument(
                "ALIAS_RESERVED", "alias: latest is the newest version, always; choose another", field="alias"
            )
        if alias.isdigit():
            raise InvalidArgument(
                "INVALID_ALIAS", f"alias: {alias!r} looks like a version; put a letter into it", field="alias"
            )
        moved = self._index.set_alias(adapter, alias, number)
        log.info("alias %s:%s -> %d", adapter, alias, number)
        return moved

    def delete_version(self, adapter: AdapterName, number: int) -> None:
        self._index.delete_version(adapter, number)
        log.info("deleted %s@%d", adapter, number)

    def counts(self) -> Counts:
        return self._index.counts()

    def blob_bytes(self) -> int:
        return self._blobs.total_bytes()

    def _profile(self, name: str) -> BaseModelProfile:
        profile = self._index.base_model(name)
        if profile is None:
            raise refusals.base_model_not_found(name, [known.name for known in self._index.base_models()])
        return profile

    def _commit(self, header: UploadHeader, profile: BaseModelProfile, upload: Upload, digest: str) -> VersionContent:
        """Validate, pack, and commit the three blobs; nothing is committed unless all of it went well."""
        # numpy comes with these: 0.1 s and 15 MiB that a store which only resolves and serves never needs
        from services.adapter_store.packing import pack
        from services.adapter_store.validation import validate

        weights = upload.weights.map()
        checked = validate(upload.config.read(), weights, profile, header.overrides)
        with self._blobs.create() as packed:
            contents = pack(
                checked.modules, weights, content_digest=digest, base_model=profile.name, write=packed.write
            )
            return VersionContent(
                content_digest=digest,
                config_digest=upload.config.commit(),
                weights_digest=upload.weights.commit(),
                pack_size=packed.size,
                pack_digest=packed.commit(),
                base_model=profile.name,
                max_rank=contents.max_rank,
                parameters=sum(module.rank * (module.in_features + module.out_features) for module in contents.modules),
                dtype=max((module.dtype for module in contents.modules), key=lambda dtype: (ITEM_SIZES[dtype], dtype)),
                warnings=checked.warnings,
                modules=tuple(BoundModule(module.name, module.rank, module.scale) for module in contents.modules),
            )


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


def _page_limit(page_size: int) -> int:
    return min(page_size or DEFAULT_PAGE, MAX_PAGE)
