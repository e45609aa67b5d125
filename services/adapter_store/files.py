"""Durable files: what blobs, log and staging share."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from services.common.errors import ResourceExhausted


@contextlib.contextmanager
def disk_full() -> Iterator[None]:
    """Raise ResourceExhausted for a disk or quota that is full, or a limit on files' sizes that is reached."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ResourceExhausted("DISK_FULL", "the store's disk is full; free some space, then upload again") from error


def make_directory(path: Path) -> None:
    """Make a directory and its parents, each durable in its own parent."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
