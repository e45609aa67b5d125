"""The adapter store: what it is made of, and the bytes it hands out."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from services.adapter_store.blobs.interface import BlobReader, Blobs
from services.adapter_store.catalog import Catalog
from services.adapter_store.changes import Changes
from services.adapter_store.collection import BLOB_GRACE_SECONDS, DELETE_GRACE_SECONDS, Collection
from services.adapter_store.findings import shown
from services.adapter_store.history import history
from services.adapter_store.index.interface import Index
from services.adapter_store.journal import Clock, Journal
from services.adapter_store.log.entry import Entry
from services.adapter_store.log.interface import AdapterLog
from services.adapter_store.original import open_weights
from services.adapter_store.refusals import version_collected
from services.adapter_store.registration import Registration
from services.adapter_store.upload import WEIGHTS_FILE, check_file_name
from services.adapter_store.uri import Root, UriRoots
from services.adapter_store.verification import Verified, verify
from services.common.errors import InvalidArgument, NotFound
from services.common.references import AdapterName


class AdapterStore:
    """One store over its blobs, log and index. Methods may block on the backends; all are safe in several threads.

    catalog: reads; registration: uploads; changes: aliases, deletions, base models; collection: garbage
    """

    def __init__(
        self,
        blobs: Blobs,
        entries: AdapterLog,
        index: Index,
        *,
        max_upload_bytes: int,
        uri_roots: Sequence[Root] = (),
        delete_grace: float = DELETE_GRACE_SECONDS,
        blob_grace: float = BLOB_GRACE_SECONDS,
        clock: Clock = time.time_ns,
    ) -> None:
        self.blobs = blobs
        self.journal = Journal(entries, index, clock=clock)
        self.catalog = Catalog(index)
        self.changes = Changes(self.journal, index)
        self.uri_roots = UriRoots(uri_roots)
        self.registration = Registration(
            blobs, self.journal, self.catalog, max_upload_bytes=max_upload_bytes, uri_roots=self.uri_roots
        )
        self.collection = Collection(blobs, self.journal, delete_grace=delete_grace, blob_grace=blob_grace)

    def heal(self) -> None:
        """Bring the index up to the log; before anything is served. Raises DataLoss when the log lacks entries."""
        self.journal.heal()

    def close(self) -> None:
        self.journal.index.close()
        self.journal.entries.close()
        self.blobs.close()
        self.uri_roots.close()

    def open_pack(self, digest: str, offset: int) -> BlobReader:
        """Packed bytes by their digest. Those of a deleted version stay readable for requests that resolved it before.

        Raises InvalidArgument and NotFound.
        """
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            raise InvalidArgument(
                "INVALID_DIGEST", f"digest: {shown(digest)} is no 'sha256:' and 64 hex digits", field="digest"
            )
        if not self.catalog.has_pack(digest):
            raise NotFound("PACK_NOT_FOUND", f"no version has pack digest {digest}; resolve the adapter again")
        reader = self.blobs.open(digest)
        if offset > reader.size:
            reader.close()
            raise InvalidArgument(
                "OFFSET_OUT_OF_RANGE", f"offset: {offset} is beyond the {reader.size} bytes there are", field="offset"
            )
        return reader

    def open_file(self, adapter: AdapterName, number: int, file: str) -> BlobReader:
        """One of a version's original files; a deleted version's too, until it is collected.

        Raises InvalidArgument, NotFound, FailedPrecondition.
        """
        check_file_name(file, field="file")
        version = self.catalog.version(adapter, number)
        if version.collected:
            raise version_collected(adapter, number)
        if file == WEIGHTS_FILE:
            return open_weights(self.blobs, version.content)
        return self.blobs.open(version.content.config_digest)

    def history(self, adapter: AdapterName, page_size: int, page_token: str) -> tuple[list[tuple[int, Entry]], str]:
        return history(self.journal.entries, self.journal.index, adapter, page_size, page_token)

    def verify(self) -> Verified:
        return verify(self.blobs, self.journal, self.journal.index)

    def blob_bytes(self) -> int:
        return self.blobs.total_bytes()
