"""Content-addressed blobs in a bucket; uploads are staged on local disk, as for every backend.

    <prefix>/blobs/sha256/ab/<64 hex>    committed; metadata `sha256` says so again; LastModified is its last commit
    <prefix>/removing/<64 hex>           somebody is removing this blob (s3_removal.py)
    <prefix>/log/                        what names mean (log/s3.py)
    <data dir>/tmp/<32 hex>.part         being written; DiskBlobs removes what a crash left

Commit order: stage → upload, which S3 shows whole or not at all, unless it is there (If-None-Match: *) → wait for a
removal that may have missed it → look that it is there with its size and checksum → remove the staged file.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from services.adapter_store.blobs.disk import DiskBlobs, PartialBlob
from services.adapter_store.blobs.interface import BlobInfo
from services.adapter_store.blobs.s3_ranges import RANGE_BYTES, RangePool, S3Reader, blob_not_found, fetch_range
from services.adapter_store.blobs.s3_removal import S3Removals
from services.adapter_store.blobs.s3_uploads import PART_BYTES, UNFINISHED_SECONDS, S3Uploads, full_checksum
from services.adapter_store.s3 import Head, S3Bucket
from services.adapter_store.s3_errors import ObjectMissing, Taken
from services.adapter_store.steps import commit_step
from services.common.errors import DataLoss, Unavailable

_COMMIT_TRIES = 5
_SECOND = 1_000_000_000

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"blobs/sha256/[0-9a-f]{2}/([0-9a-f]{64})")


class S3PartialBlob(PartialBlob):
    """A blob being staged. Other than on disk, its bytes need not be durable before they are in the bucket."""

    def __init__(self, blobs: S3Blobs, staging: DiskBlobs, path: Path) -> None:
        super().__init__(staging, path)
        self._target = blobs

    def sync(self) -> None:
        """Nothing: what is staged is read once more, and may be lost with the machine."""

    def _sync_ahead(self) -> None:
        """Nothing, as well."""

    def commit(self, *, keep: bool = False) -> str:
        digest = self.digest
        on_disk = self.path.stat().st_size
        if on_disk != self.size:
            raise DataLoss("SHORT_WRITE", f"wrote {self.size} bytes, the disk holds {on_disk}; check the disk")
        self._target.commit(digest, self.map())
        if not keep:
            self.discard()
        return digest


class S3Blobs:
    """All blobs beneath one prefix. Safe to use from several threads, and by several processes at once."""

    def __init__(
        self, bucket: S3Bucket, staging: DiskBlobs, *, part_bytes: int = PART_BYTES, range_bytes: int = RANGE_BYTES
    ) -> None:
        """bucket and staging are closed with this."""
        self._bucket = bucket
        self._staging = staging
        self.ranges = RangePool(partial(fetch_range, bucket), range_bytes=range_bytes)
        self._removals = S3Removals(bucket)
        self._uploads = S3Uploads(bucket, part_bytes)

    def close(self) -> None:
        self._uploads.close()
        self.ranges.close()
        self._removals.close()
        self._staging.close()
        self._bucket.close()

    def create(self) -> S3PartialBlob:
        return S3PartialBlob(self, self._staging, self._staging.root / "tmp" / f"{secrets.token_hex(16)}.part")

    def open(self, digest: str) -> S3Reader:
        head = self._bucket.head(_name(digest))
        if head is None:
            raise blob_not_found(_name(digest))
        return S3Reader(self.ranges, _name(digest), head.size)

    def list(self) -> Iterator[BlobInfo]:
        for listed in self._bucket.list("blobs/sha256/"):
            if found := _NAME.fullmatch(listed.name):
                yield BlobInfo(f"sha256:{found[1]}", listed.size, _latest_ns(listed.modified))

    def delete(self, digest: str, *, before_ns: int) -> bool:
        return self._removals.remove(_name(digest), lambda head: _latest_ns(head.modified) < before_ns)

    def total_bytes(self) -> int:
        return sum(blob.size for blob in self.list())

    def commit(self, digest: str, data: memoryview) -> None:
        """Make a blob be there, and young. Raises DataLoss when other bytes are, Unavailable, FailedPrecondition."""
        name = _name(digest)
        for _ in range(_COMMIT_TRIES):
            head = self._bucket.head(name)
            if head is None:
                self._uploads.put(name, digest, data)
            else:
                self._check(name, digest, len(data), head)
                self._touch(name, digest, head)
            self._removals.wait(name)
            if (head := self._bucket.head(name)) is not None:
                self._check(name, digest, len(data), head)
                return
        raise Unavailable("BLOB_BEING_REMOVED", f"{digest} was removed each time it was written; upload it again")

    def remove_unfinished(self, older_than_seconds: float = UNFINISHED_SECONDS) -> int:
        """Abort uploads that a crash left, which are invisible and yet paid for; returns how many."""
        return self._uploads.remove_unfinished(older_than_seconds)

    def _touch(self, name: str, digest: str, head: Head) -> None:
        """Make a blob young, by copying it onto itself; nothing happens when it is removed meanwhile."""
        location = self._bucket.location(name)
        try:
            with self._bucket.errors("renew", name):
                self._bucket.client.copy_object(
                    **location,
                    CopySource=location,
                    CopySourceIfMatch=head.etag,
                    MetadataDirective="REPLACE",
                    Metadata={"sha256": digest},
                    ChecksumAlgorithm="SHA256",
                )
        except (ObjectMissing, Taken):
            return
        commit_step("blobs.s3.renewed")

    def _check(self, name: str, digest: str, size: int, head: Head) -> None:
        """Raise DataLoss unless what is there is the blob, as far as can be told without reading it."""
        checksum = head.checksum_sha256
        if (
            head.size != size
            or head.metadata.get("sha256") != digest
            or (checksum is not None and "-" not in checksum and checksum != full_checksum(digest))
        ):
            raise DataLoss(
                "BLOB_CORRUPT",
                f"{self._bucket.config.uri}/{name} is not the {size} bytes of {digest}; something else wrote it: "
                "remove it, then upload again",
            )


def _name(digest: str) -> str:
    found = _DIGEST.fullmatch(digest)
    assert found, digest
    return f"blobs/sha256/{found[1][:2]}/{found[1]}"


def _latest_ns(modified: int) -> int:
    """S3 rounds times down to seconds. Taken for as young as it may be, nothing is removed too early."""
    return (modified + 1) * _SECOND - 1
