"""Adapters by path: two files of a directory beneath a configured root, and nothing outside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from services.common.errors import FailedPrecondition, NotFound, PermissionDenied

FILES = ("adapter_config.json", "adapter_model.safetensors")

AdapterFiles = Mapping[str, BinaryIO]
"""The open files of a PEFT directory, by name."""


@contextmanager
def open_adapter(root: Path | None, path: str) -> Iterator[AdapterFiles]:
    """The files of the PEFT directory at `path`, relative to the root or absolute.

    Links and `..` are resolved before a path is compared with the root; of what is outside, nothing is told. Raises
    FailedPrecondition without a root, PermissionDenied, NotFound.
    """
    if root is None:
        raise FailedPrecondition(
            "NO_ADAPTER_ROOT", "this replica takes no paths; start it with --adapter-root", field="path"
        )
    with ExitStack() as stack:
        yield {name: stack.enter_context(_open(root.resolve(), path, name)) for name in FILES}


def _open(root: Path, path: str, name: str) -> BinaryIO:
    try:
        resolved = Path(os.path.realpath(root / path / name))
        inside = resolved.is_relative_to(root)
        if inside and resolved.is_file():
            return os.fdopen(os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW), "rb")
    except ValueError:  # a NUL in the path
        inside = False
    except OSError as error:
        raise NotFound(
            "FILE_NOT_FOUND", f"path: {path!r}: {name} cannot be read: {error.strerror}", field="path"
        ) from error
    if not inside:
        raise PermissionDenied("PATH_NOT_ALLOWED", f"path: {path!r} is not beneath --adapter-root", field="path")
    raise NotFound(
        "FILE_NOT_FOUND", f"path: {path!r} has no {name}; give a directory PEFT saved (safetensors)", field="path"
    )
