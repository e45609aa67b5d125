"""The log in a directory, one file an entry: see interface.py for the layout.

An entry is written under `<root>/tmp/`, synced, and linked to its name, which fails if the name exists; then its
directory is synced. A reader sees a whole entry or none. DiskBlobs of the same root removes what a crash left in tmp/.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from services.adapter_store.files import disk_full, fsync_directory, make_directory
from services.adapter_store.log.interface import StreamInfo
from services.adapter_store.steps import commit_step

_ENTRY = re.compile(r"([0-9]{12})\.json")


class DiskLog:
    def __init__(self, root: Path) -> None:
        self._tmp = root / "tmp"
        self._log = root / "log"
        make_directory(self._tmp)
        make_directory(self._log)

    def close(self) -> None:
        """Nothing is held open."""

    def append(self, stream: str, seq: int, data: bytes) -> bool:
        final = self._path(stream, seq)
        staged = self._tmp / f"{secrets.token_hex(16)}.entry"
        with disk_full():
            make_directory(final.parent)
        try:
            with disk_full():
                with staged.open("xb", buffering=0) as file:
                    rest = memoryview(data)
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                commit_step("log.disk.staged")
                os.link(staged, final)
            commit_step("log.disk.linked")
        except FileExistsError:
            return False
        finally:
            staged.unlink(missing_ok=True)
            # also when it existed: whoever reads it now builds on it, and its writer may not have come this far
            fsync_directory(final.parent)
        return True

    def read(self, stream: str, seq: int) -> bytes | None:
        try:
            return self._path(stream, seq).read_bytes()
        except FileNotFoundError:
            return None

    def streams(self) -> Iterator[StreamInfo]:
        for directory, _, files in os.walk(self._log, onerror=_raise):
            seqs = [int(found[1]) for file in files if (found := _ENTRY.fullmatch(file))]
            if seqs:
                yield StreamInfo(str(Path(directory).relative_to(self._log)), max(seqs), len(seqs))

    def _path(self, stream: str, seq: int) -> Path:
        return self._log / stream / f"{seq:012d}.json"


def _raise(error: OSError) -> None:
    """A directory that cannot be read is no empty one: what is not listed is not marked, and would be swept."""
    if not isinstance(error, FileNotFoundError):
        raise error
