"""Sending a blob to S3: small ones at once, large ones in parts, several on the way together.

Every part is sent with its sha256, which S3 verifies, and the whole is hashed once more as its parts are read from
the staged file: what S3 shows under a digest are the bytes of that digest. An upload in parts is invisible until it is
completed; one that fails is aborted when none of its parts is on the way any more.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from services.adapter_store.s3 import S3Bucket, sha256_base64
from services.adapter_store.s3_errors import ObjectMissing, Taken
from services.adapter_store.steps import commit_step
from services.common.errors import DataLoss, MultiloraError

# Larger parts make fewer requests, smaller ones less memory: PARTS_AT_ONCE of them are held, whatever the number of
# uploads. S3 takes 5 MiB or more, and at most 10,000 parts.
PART_BYTES = 8 << 20
MAX_PARTS = 9_000
PARTS_AT_ONCE = 4
UNFINISHED_SECONDS = 24 * 3600.0

log = logging.getLogger(__name__)


class _Part(NamedTuple):
    """Named as S3 names them. S3 compares both when the upload is completed."""

    PartNumber: int
    ETag: str
    ChecksumSHA256: str


class S3Uploads:
    """Safe to use from several threads."""

    def __init__(self, bucket: S3Bucket, part_bytes: int) -> None:
        self._bucket = bucket
        self._part_bytes = part_bytes
        self._threads = ThreadPoolExecutor(PARTS_AT_ONCE, "s3-part")
        self._parts_held = threading.BoundedSemaphore(PARTS_AT_ONCE)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def put(self, name: str, digest: str, data: memoryview) -> None:
        """Put the bytes under a name; that others did so meanwhile is fine."""
        if len(data) > self._part_bytes:
            self._upload_parts(name, digest, data)
            return
        _check_hash(digest, hashlib.sha256(data).hexdigest())
        try:
            with self._bucket.errors("write", name):
                self._bucket.client.put_object(
                    **self._bucket.location(name),
                    Body=bytes(data),
                    IfNoneMatch="*",
                    ChecksumSHA256=full_checksum(digest),
                    Metadata={"sha256": digest},
                )
        except Taken:
            return
        commit_step("blobs.s3.put")

    def _upload_parts(self, name: str, digest: str, data: memoryview) -> None:
        location = self._bucket.location(name)
        with self._bucket.errors("write", name):
            begun = self._bucket.client.create_multipart_upload(
                **location, ChecksumAlgorithm="SHA256", Metadata={"sha256": digest}
            )
        upload_id = begun["UploadId"]
        commit_step("blobs.s3.begun")
        try:
            parts = self._send_parts(name, upload_id, digest, data)
            commit_step("blobs.s3.sent")
            with self._bucket.errors("write", name):
                self._bucket.client.complete_multipart_upload(
                    **location,
                    UploadId=upload_id,
                    IfNoneMatch="*",
                    MultipartUpload={"Parts": [part._asdict() for part in parts]},
                )
        except (Taken, ObjectMissing):
            # there already; or the upload is gone, as its completion was sent twice: the caller looks
            self._abort(name, upload_id)
        except BaseException:
            self._abort(name, upload_id)
            raise
        commit_step("blobs.s3.completed")

    def _send_parts(self, name: str, upload_id: str, digest: str, data: memoryview) -> tuple[_Part, ...]:
        """Send all parts, some at once, and hash the whole on the way."""
        part_bytes = max(self._part_bytes, -(-len(data) // MAX_PARTS))
        whole = hashlib.sha256()
        sent: list[Future[_Part]] = []
        try:
            for number, start in enumerate(range(0, len(data), part_bytes), start=1):
                if any(part.done() and part.exception() is not None for part in sent):
                    break
                self._parts_held.acquire()
                body = bytes(data[start : start + part_bytes])
                whole.update(body)
                sent.append(self._threads.submit(self._send_part, name, upload_id, number, body))
                sent[-1].add_done_callback(lambda _: self._parts_held.release())
            parts = tuple(part.result() for part in sent)
        finally:
            for part in sent:  # an upload is aborted only when none of its parts is on the way any more
                part.cancel()
            for part in sent:
                if not part.cancelled():
                    part.exception()
        _check_hash(digest, whole.hexdigest())
        return parts

    def _send_part(self, name: str, upload_id: str, number: int, body: bytes) -> _Part:
        checksum = sha256_base64(body)
        with self._bucket.errors("write", name):
            answer = self._bucket.client.upload_part(
                **self._bucket.location(name),
                UploadId=upload_id,
                PartNumber=number,
                Body=body,
                ChecksumSHA256=checksum,
            )
        return _Part(number, answer["ETag"], checksum)

    def _abort(self, name: str, upload_id: str) -> None:
        """Best effort: what is left is removed when it is a day old."""
        try:
            with self._bucket.errors("abort", name):
                self._bucket.client.abort_multipart_upload(**self._bucket.location(name), UploadId=upload_id)
        except ObjectMissing:
            pass
        except (MultiloraError, Taken) as error:
            log.warning("an unfinished upload of %s stays: %s", name, error)

    def remove_unfinished(self, older_than_seconds: float = UNFINISHED_SECONDS) -> int:
        """Abort uploads that a crash left, which are invisible and yet paid for; returns how many.

        Best effort: whoever may write need not be allowed to list unfinished uploads.
        """
        count = 0
        where = {"Bucket": self._bucket.config.bucket, "Prefix": self._bucket.key("blobs/")}
        try:
            with self._bucket.errors("list unfinished uploads"):
                for page in self._bucket.client.get_paginator("list_multipart_uploads").paginate(**where):
                    now = self._bucket.server_time(page)
                    for upload in page.get("Uploads", ()):
                        if now - upload["Initiated"].timestamp() >= older_than_seconds:
                            self._abort(self._bucket.name(upload["Key"]), upload["UploadId"])
                            count += 1
        except (MultiloraError, ObjectMissing) as error:
            log.warning("unfinished uploads are not looked for: %s", error)
        return count


def full_checksum(digest: str) -> str:
    """A digest as S3 writes it; a blob of several parts has one of its parts' checksums instead, with a dash."""
    return base64.b64encode(bytes.fromhex(digest.removeprefix("sha256:"))).decode()


def _check_hash(digest: str, found: str) -> None:
    if digest != f"sha256:{found}":
        raise DataLoss("STAGED_BYTES_CHANGED", f"the staged bytes of {digest} read back as {found}; check the disk")
