"""A PEFT directory as the stream of messages that RegisterVersion takes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from multilora.adapter_store.v1.admin_pb2 import RegisterVersionHeader
from services.common.errors import NotFound
from services.common.wire import UPLOAD_CHUNK_BYTES, Chunk, UploadPart

FILES = ("adapter_config.json", "adapter_model.safetensors")

Advance = Callable[[int], None]


def check_directory(path: Path) -> int:
    """The bytes an upload of `path` sends. Raises NotFound naming the file that is missing."""
    for name in FILES:
        if not (path / name).is_file():
            raise NotFound(
                "FILE_NOT_FOUND", f"{path} has no {name}; give the directory PEFT's save_pretrained wrote (safetensors)"
            )
    return sum((path / name).stat().st_size for name in FILES)


def upload_messages(header: RegisterVersionHeader, path: Path, advance: Advance) -> Iterator[UploadPart]:
    """The header, then each file in chunks; `advance` hears of the bytes of each chunk once it is asked for."""
    yield header
    for name in FILES:
        with (path / name).open("rb") as file:
            while data := file.read(UPLOAD_CHUNK_BYTES):
                yield Chunk(name, data)
                advance(len(data))


@contextlib.contextmanager
def upload_progress(name: str, total: int) -> Iterator[Advance]:
    """A progress bar on stderr, when a person watches it."""
    if not sys.stderr.isatty():
        yield lambda _count: None
        return
    from rich.console import Console  # costs a tenth of a second
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"uploading {name}", total=total)
        yield lambda count: progress.advance(task, count)
