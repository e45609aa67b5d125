"""Backends by where they are: a path is a disk, `s3://bucket/prefix` an S3 bucket, `redis://…` a Redis.

A place holds blobs and log together, as the log is worth nothing without the blobs it names.
"""

from __future__ import annotations

from pathlib import Path

from services.adapter_store.blobs.disk import DiskBlobs
from services.adapter_store.blobs.interface import Blobs
from services.adapter_store.index.interface import Index
from services.adapter_store.index.sqlite import SqliteIndex
from services.adapter_store.log.disk import DiskLog
from services.adapter_store.log.interface import AdapterLog
from services.common.errors import InvalidArgument

INDEX_FILE = "index.sqlite3"


def open_place(place: str) -> tuple[Blobs, AdapterLog]:
    """Blobs and log of one place. Raises InvalidArgument for a place of another kind, Unavailable."""
    _check_scheme(place, "--blobs", "a path")
    root = Path(place)
    return DiskBlobs(root), DiskLog(root)


def open_index(place: str) -> Index:
    """An index. Raises InvalidArgument for a place of another kind, Unavailable."""
    _check_scheme(place, "--index", "a path")
    path = Path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    return SqliteIndex(path)


def _check_scheme(place: str, flag: str, known: str) -> None:
    if not place or "://" in place:
        raise InvalidArgument("INVALID_FLAG", f"{flag} is {place!r}, which is not known; give {known}", field=flag)
