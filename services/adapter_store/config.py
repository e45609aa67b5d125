"""The store's settings, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from services.adapter_store.backends import INDEX_FILE
from services.adapter_store.collection import DELETE_GRACE_SECONDS
from services.adapter_store.index.redis_config import SCHEMES, RedisConfig, without_password
from services.adapter_store.s3_config import S3Config
from services.common.auth.settings import SAME_PORT, Security, admin_port
from services.common.errors import InvalidArgument

DEFAULT_PORT = 50052
S3_ADDRESSING = {"auto": None, "path": True, "virtual": False}  # S3Config.path_style
DEFAULT_MAX_UPLOAD_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Settings of one store process.

    port: 0 means any free one
    admin_port: of AdapterAdminService; None is 10 above the other port, -1 that port itself
    metrics_port: of /metrics over HTTP; 0 means any free one, None none
    data_dir: everything the store keeps
    uri_roots: what RegisterFromUri may read beneath, directories and s3://bucket/prefix; none means it may not
    max_upload_bytes: of both files of one upload together
    blobs, index: places of blobs and log, and of the index; empty: in data_dir, where uploads wait in any case
    redis_prefix: of the index's keys in Redis; empty: the default
    s3_endpoint_url, s3_region: empty: the AWS environment's
    s3_addressing: of the bucket: in the path, in the host name, or whichever suits the endpoint
    delete_grace: seconds in which a deleted version can be brought back
    security: who may call
    Raises InvalidArgument naming the flag.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    admin_port: int | None = None
    metrics_port: int | None = None
    data_dir: Path = Path(".data/store")
    uri_roots: tuple[str, ...] = ()
    max_upload_bytes: int = DEFAULT_MAX_UPLOAD_BYTES
    blobs: str = ""
    index: str = field(default="", repr=False)
    redis_prefix: str = ""
    s3_endpoint_url: str = ""
    s3_region: str = ""
    s3_addressing: str = "auto"
    delete_grace: float = DELETE_GRACE_SECONDS
    security: Security = field(default_factory=Security)

    def __post_init__(self) -> None:
        if not self.host:
            raise _invalid("--host", "is empty; name an address, as 127.0.0.1")
        if not 0 <= self.port <= 65535:
            raise _invalid("--port", f"is {self.port}; it must be 0 to 65535")
        if not SAME_PORT <= admin_port(self.admin_port, self.port) <= 65535:
            raise _invalid("--admin-port", f"is {self.admin_port}; it must be 0 to 65535, or {SAME_PORT}")
        self.security.check_host(self.host)
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise _invalid("--metrics-port", f"is {self.metrics_port}; it must be 0 to 65535, or -1 for none")
        if self.max_upload_bytes < 1:
            raise _invalid("--max-upload-bytes", f"is {self.max_upload_bytes}; it must be 1 or more")
        if self.data_dir.exists() and not self.data_dir.is_dir():
            raise _invalid("--data-dir", f"is {self.data_dir}, which is no directory")
        if not 0 <= self.delete_grace < float("inf"):
            raise _invalid("--delete-grace", f"is {self.delete_grace}; it must be 0 or more seconds")

        if self.s3_addressing not in S3_ADDRESSING:
            raise _invalid("--s3-addressing", f"is {self.s3_addressing!r}; it must be {', '.join(S3_ADDRESSING)}")
        if self.s3_endpoint_url and not self.s3_endpoint_url.startswith(("http://", "https://")):
            raise _invalid("--s3-endpoint-url", f"is {self.s3_endpoint_url!r}; it must start with http:// or https://")
        if (self.s3_endpoint_url or self.s3_region) and not any(map(_is_s3, (self.blobs, *self.uri_roots))):
            raise _invalid(
                "--s3-endpoint-url", "or --s3-region is for s3:// in --blobs or --uri-root, which is not given"
            )
        if _is_s3(self.blobs):
            self.s3_config(self.blobs)
        for root in self.uri_roots:
            self._check_uri_root(root)

        if self.index.startswith(SCHEMES):
            RedisConfig.parse(self.index, self.redis_prefix)
        elif self.redis_prefix:
            raise _invalid("--redis-prefix", "is for --index redis://host:port/db, which is not given")

    def _check_uri_root(self, root: str) -> None:
        if _is_s3(root):
            bucket = self.s3_config(root)
            own = self.s3_config(self.blobs) if _is_s3(self.blobs) else None
            holds_own = own is not None and own.bucket == bucket.bucket and bucket.holds(own.prefix)
        elif Path(root).is_dir():
            holds_own = self.data_dir.resolve().is_relative_to(Path(root).resolve())
        else:
            raise _invalid("--uri-root", f"is {root!r}, which is no directory and no s3://bucket/prefix")
        if holds_own:
            raise _invalid("--uri-root", f"is {root!r}, which holds the store's own data; choose one that does not")

    def s3_config(self, place: str) -> S3Config:
        """Of `s3://bucket/prefix`. Raises InvalidArgument."""
        path_style = S3_ADDRESSING[self.s3_addressing]
        return S3Config.parse(place, self.s3_endpoint_url or None, self.s3_region or None, path_style)

    @property
    def uri_root_places(self) -> list[Path | S3Config]:
        return [self.s3_config(root) if _is_s3(root) else Path(root) for root in self.uri_roots]

    @property
    def blobs_place(self) -> str:
        return self.blobs or str(self.data_dir)

    @property
    def index_place(self) -> str:
        return self.index or str(self.data_dir / INDEX_FILE)

    @property
    def index_shown(self) -> str:
        """The place of the index, without a password."""
        return without_password(self.index_place)

    def address(self, port: int) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{port}"


def _is_s3(place: str) -> bool:
    return place.startswith("s3://")


def _invalid(flag: str, what: str) -> InvalidArgument:
    return InvalidArgument("INVALID_FLAG", f"{flag} {what}", field=flag)
