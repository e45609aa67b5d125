"""Backends by where they are: a path is a disk, `s3://bucket/prefix` an S3 bucket, `redis://…` a Redis.

A place holds blobs and log together, as the log is worth nothing without the blobs it names.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from services.adapter_store.blobs.disk import DiskBlobs
from services.adapter_store.blobs.interface import Blobs
from services.adapter_store.index.interface import Index
from services.adapter_store.index.redis_config import SCHEMES, RedisConfig, without_password
from services.adapter_store.index.sqlite import SqliteIndex
from services.adapter_store.log.disk import DiskLog
from services.adapter_store.log.interface import AdapterLog
from services.adapter_store.s3_config import S3Config
from services.common.errors import InvalidArgument

if TYPE_CHECKING:
    from services.adapter_store.s3 import S3Bucket

INDEX_FILE = "index.sqlite3"


def open_place(
    place: str,
    *,
    staging: Path,
    endpoint_url: str | None = None,
    region: str | None = None,
    path_style: bool | None = None,
) -> tuple[Blobs, AdapterLog]:
    """Blobs and log of one place; all but the first are for S3 only (see S3Config). staging: where uploads wait.

    Raises InvalidArgument for a place of another kind, Unavailable, FailedPrecondition when S3 refuses.
    """
    if place.startswith("s3://"):
        return _open_s3(S3Config.parse(place, endpoint_url, region, path_style), staging)
    _check_scheme(place, "--blobs", "a path or s3://bucket/prefix")
    root = Path(place)
    return DiskBlobs(root), DiskLog(root)


def _open_s3(config: S3Config, staging: Path) -> tuple[Blobs, AdapterLog]:
    # these come with S3 only: boto3 takes a third of a second to import
    from services.adapter_store.blobs.s3 import S3Blobs
    from services.adapter_store.log.s3 import S3Log

    bucket = _open_bucket(config, "--blobs")
    bucket.check()
    blobs = S3Blobs(bucket, DiskBlobs(staging))
    blobs.remove_unfinished()
    return blobs, S3Log(bucket)


def open_root(place: Path | S3Config) -> Path | S3Bucket:
    """What RegisterFromUri may read beneath. A bucket is not asked: a store starts while what it may import is away.

    Raises InvalidArgument.
    """
    return place if isinstance(place, Path) else _open_bucket(place, "--uri-root")


def _open_bucket(config: S3Config, flag: str) -> S3Bucket:
    from services.adapter_store.s3 import S3Bucket

    try:
        return S3Bucket(config)
    except ImportError as error:
        raise InvalidArgument(
            "INVALID_FLAG", f"{flag} is {config.uri!r}, which needs boto3: pip install 'multilora[s3]'", field=flag
        ) from error


def open_index(place: str, *, prefix: str = "") -> Index:
    """An index; prefix: of keys, for Redis only. Raises InvalidArgument for a place of another kind, Unavailable,
    FailedPrecondition when Redis refuses.
    """
    if place.startswith(SCHEMES):
        return _open_redis(RedisConfig.parse(place, prefix))
    _check_scheme(place, "--index", "a path, redis://host:port/db or rediss://host:port/db")
    path = Path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    return SqliteIndex(path)


def _open_redis(config: RedisConfig) -> Index:
    try:
        from services.adapter_store.index.redis import RedisIndex
    except ImportError as error:
        raise InvalidArgument(
            "INVALID_FLAG",
            f"--index is {config.where!r}, which needs redis-py: pip install 'multilora[redis]'",
            field="--index",
        ) from error
    return RedisIndex(config)


def _check_scheme(place: str, flag: str, known: str) -> None:
    if not place or ":" in place.split("/")[0]:
        raise InvalidArgument(
            "INVALID_FLAG", f"{flag} is {without_password(place)!r}, which is not known; give {known}", field=flag
        )
