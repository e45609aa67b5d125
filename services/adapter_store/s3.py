"""One bucket of an S3-compatible server, as blobs and log use it: exclusive creation, whole reads, listing, errors.

boto3 is imported when a bucket is opened, not before: a store on disk starts without it.

Every request has a connect and a read timeout and a bounded number of attempts, so that a call ends in
(attempts × timeouts + backoff) at the latest. What goes wrong comes as s3_errors.py says.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from services.adapter_store.s3_config import S3Config
from services.adapter_store.s3_errors import ObjectMissing, Taken, s3_errors, unavailable
from services.common.errors import FailedPrecondition, Unavailable

WRITER = "writer"  # metadata of what was created exclusively: who did it


class Head(NamedTuple):
    """What is known of an object without reading it. modified and now: seconds since 1970 by the server's clock,
    both whole, rounded down."""

    size: int
    etag: str
    modified: int
    now: int
    metadata: Mapping[str, str]
    checksum_sha256: str | None


class Listed(NamedTuple):
    """name: the key beneath the prefix."""

    name: str
    size: int
    modified: int


class S3Bucket:
    """The keys beneath one prefix of one bucket; a name is a key without it. Safe to use from several threads."""

    def __init__(self, config: S3Config) -> None:
        import boto3
        from botocore.config import Config

        self.config = config
        self._prefix = f"{config.prefix}/" if config.prefix else ""
        endpoint = config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        path_style = config.path_style if config.path_style is not None else endpoint is not None
        with self.errors("connect"):
            # a session of its own: the default one is shared by the process and not safe in threads
            self.client = boto3.session.Session().client(
                "s3",
                endpoint_url=config.endpoint_url,
                region_name=config.region,
                config=Config(
                    connect_timeout=config.connect_timeout,
                    read_timeout=config.read_timeout,
                    retries={"mode": "standard", "total_max_attempts": config.attempts},
                    max_pool_connections=config.connections,
                    s3={"addressing_style": "path" if path_style else "virtual"},
                    # Checksums are given explicitly, as sha256. Those that boto3 would add on its own are trailers,
                    # which older servers refuse, and those of a whole object do not fit a range of it.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )

    def close(self) -> None:
        self.client.close()

    def check(self) -> None:
        """Raise unless the bucket is there, may be written, and honours exclusive creation, on which truth rests."""
        for _ in self.list("", page_size=1):
            break
        name = f"probe/{secrets.token_hex(16)}"
        try:
            if not self.create(name, b"1") or self.create(name, b"2"):
                raise FailedPrecondition(
                    "STORAGE_NOT_CONDITIONAL",
                    f"the S3 server of {self.config.uri} ignores If-None-Match, so two writers could overwrite each "
                    "other; use one that honours it",
                )
        finally:
            self.delete(name)

    def key(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def name(self, key: str) -> str:
        return key.removeprefix(self._prefix)

    @staticmethod
    def server_time(answer: Any) -> int:
        """When the server answered, by its own clock, in whole seconds since 1970."""
        return int(parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp())

    def location(self, name: str) -> dict[str, str]:
        """The parameters of a request that name one object."""
        return {"Bucket": self.config.bucket, "Key": self.key(name)}

    def head(self, name: str) -> Head | None:
        """None: there is no such object."""
        try:
            with self.errors("read", name):
                answer = self.client.head_object(**self.location(name), ChecksumMode="ENABLED")
        except ObjectMissing:
            return None
        return Head(
            size=answer["ContentLength"],
            etag=answer["ETag"],
            modified=int(answer["LastModified"].timestamp()),
            now=self.server_time(answer),
            metadata=answer.get("Metadata", {}),
            checksum_sha256=answer.get("ChecksumSHA256"),
        )

    def get(self, name: str) -> bytes | None:
        """A small object's bytes; None: there is no such object."""
        from botocore.exceptions import BotoCoreError

        for attempt in range(self.config.attempts):
            if attempt:
                backoff(attempt)
            try:
                with self.errors("read", name):
                    answer = self.client.get_object(**self.location(name))
                with contextlib.closing(answer["Body"]) as body:
                    data: bytes = body.read()
                return data
            except ObjectMissing:
                return None
            except BotoCoreError as error:  # while the body came: what fails before is retried by botocore itself
                cut = error
        raise self.unavailable("read", name, cut)

    def create(self, name: str, data: bytes) -> bool:
        """Put a small object unless one is there, exactly once; False: there is one, of another writer.

        A request that is sent again, because its answer was lost, finds its own object there. So each creation has
        an id of its own in the metadata, and whoever finds the name taken looks whose it is.
        """
        writer = secrets.token_hex(16)
        for attempt in range(self.config.attempts):
            if attempt:
                backoff(attempt)
            try:
                with self.errors("write", name):
                    self.client.put_object(
                        **self.location(name),
                        Body=data,
                        IfNoneMatch="*",
                        ChecksumSHA256=sha256_base64(data),
                        Metadata={WRITER: writer},
                    )
                return True
            except (Taken, Unavailable) as error:
                there = self.head(name)
                if there is not None:
                    return there.metadata.get(WRITER) == writer
                if isinstance(error, Unavailable):
                    raise
                # taken, and yet not there: another creation had not ended, or a removal came between; once more
        raise self.unavailable("write", name, "others write it all the time")

    def replace(self, name: str, data: bytes, *, etag: str) -> bool:
        """Overwrite a small object if it still has this ETag; False: it has not."""
        try:
            with self.errors("write", name):
                self.client.put_object(
                    **self.location(name), Body=data, IfMatch=etag, ChecksumSHA256=sha256_base64(data)
                )
        except (Taken, ObjectMissing):
            return False
        return True

    def delete(self, name: str) -> None:
        """Remove an object; that there is none is fine."""
        with self.errors("remove", name):
            self.client.delete_object(**self.location(name))

    def list(self, beneath: str, *, page_size: int = 1000) -> Iterator[Listed]:
        """Every object whose name starts with `beneath`, page by page."""
        token: dict[str, str] = {}
        while True:
            with self.errors("list", beneath):
                page = self.client.list_objects_v2(
                    Bucket=self.config.bucket, Prefix=self.key(beneath), MaxKeys=page_size, **token
                )
            for entry in page.get("Contents", ()):
                yield Listed(self.name(entry["Key"]), entry["Size"], int(entry["LastModified"].timestamp()))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def errors(self, action: str, name: str = "") -> AbstractContextManager[None]:
        """Raise what botocore raises as an error of this tree, or as ObjectMissing or Taken."""
        return s3_errors(self.config.uri, action, name)

    def unavailable(self, action: str, name: str, why: object) -> Unavailable:
        return unavailable(self.config.uri, action, name, why)


def sha256_base64(data: bytes | memoryview) -> str:
    """As S3 writes checksums."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def backoff(attempt: int) -> None:
    """Wait before attempt 1, 2, …: up to 0.2 s, 0.4 s, … 2 s; by chance, so that many clients do not come together."""
    time.sleep(min(0.1 * 2**attempt, 2.0) * (0.5 + secrets.randbelow(1000) / 2000))
