"""A PEFT directory behind a `file://` URI."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from services.adapter_store.findings import shown
from services.adapter_store.upload import CONFIG_FILE, WEIGHTS_FILE, Upload, check_no_pickle
from services.adapter_store.uri_refusals import invalid_uri, nothing_there, outside_roots
from services.common.errors import InvalidArgument, NotFound

_CHUNK_BYTES = 1 << 20


def copy_from_directory(uri: str, roots: Sequence[Path], upload: Upload) -> None:
    """Copy both files of a PEFT directory into `upload`.

    Links and `..` are resolved before a path is compared with the roots; each file is compared too, as it may be a
    link itself. Raises InvalidArgument, NotFound, PermissionDenied.
    """
    directory = _resolve(_path(uri), roots)
    if not directory.is_dir():
        raise InvalidArgument("INVALID_URI", f"uri: {shown(uri)} is no directory; name a PEFT directory", field="uri")
    if not os.path.lexists(directory / WEIGHTS_FILE):
        check_no_pickle(path.name for path in directory.glob("adapter_model.*"))
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if os.path.lexists(directory / file):
            _copy(_resolve(directory / file, roots), file, upload)


def _path(uri: str) -> Path:
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise invalid_uri(uri) from error
    path = unquote(parts.path)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise invalid_uri(uri)
    if not path.startswith("/") or "\0" in path:
        raise invalid_uri(uri)
    return Path(path)


def _resolve(path: Path, roots: Sequence[Path]) -> Path:
    """The path without links, when it is beneath a root. Of what is outside, nothing is told."""
    try:
        resolved, is_there = path.resolve(strict=True), True
    except (OSError, RuntimeError):  # missing, not readable, or a loop of links
        resolved, is_there = Path(os.path.realpath(path)), False
    if not _beneath(resolved, roots):
        raise outside_roots(str(path))
    if not is_there:
        raise nothing_there(str(path))
    return resolved


def _beneath(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _copy(path: Path, file: str, upload: Upload) -> None:
    # NOFOLLOW: the path was resolved, so a link here was put there since; NONBLOCK: a pipe must not hold the thread
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EACCES, errno.ENOENT, errno.ENXIO):
            raise
        raise NotFound("PATH_NOT_FOUND", f"uri: {shown(str(path))} cannot be read", field="uri") from error
    with os.fdopen(fd, "rb", buffering=0) as source:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidArgument("INVALID_URI", f"uri: {shown(file)} is no regular file", field="uri")
        while data := source.read(_CHUNK_BYTES):
            upload.write(file, data)
        upload.write(file, b"")  # an empty file has come, too
