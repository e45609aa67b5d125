"""Where an S3 bucket is, checked before anything is sent to it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.common.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class S3Config:
    """Where the bucket is, and how patient to be. Credentials come from the standard AWS chain, never from here.

    prefix: of every key, without a slash at either end; empty: none
    endpoint_url: None means the AWS environment's (AWS_ENDPOINT_URL_S3), or AWS itself
    region: None means the AWS environment's (AWS_REGION)
    path_style: bucket in the path and not in the host name; None: wherever the endpoint is not AWS's own
    attempts: per request, the first included
    connections: kept open at most, and so the most requests at once
    """

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    path_style: bool | None = None
    connect_timeout: float = 5.0
    read_timeout: float = 30.0
    attempts: int = 4
    connections: int = 32

    @classmethod
    def parse(
        cls, uri: str, endpoint_url: str | None = None, region: str | None = None, path_style: bool | None = None
    ) -> S3Config:
        """From `s3://bucket/prefix`. Raises InvalidArgument."""
        found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([A-Za-z0-9!_.*'()/-]*))?", uri)
        prefix = (found[2] or "").strip("/") if found else ""
        if found is None or "//" in prefix:
            raise InvalidArgument(
                "INVALID_S3_URI", f"{uri!r} is not taken; s3://bucket or s3://bucket/prefix is needed"
            )
        return cls(found[1], prefix, endpoint_url, region, path_style)

    def holds(self, key: str) -> bool:
        """Whether a key is the prefix or lies beneath it."""
        return not self.prefix or f"{key}/".startswith(f"{self.prefix}/")

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")
