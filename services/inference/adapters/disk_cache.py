"""Packed adapters on this node's disk, by pack digest; bounded in bytes, least recently used out first, kept over
restarts.

    <root>/<hex of the pack digest>     complete and verified when it was written
    <root>/tmp-<hex>                    a pull under way, or broken and to be gone on with; removed at start
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterable
from io import RawIOBase
from pathlib import Path

from services.common.errors import DataLoss

log = logging.getLogger(__name__)

_TEMPORARY = "tmp-"


class DiskCache:
    """Used by the fetch workers, several at a time."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(f"{_TEMPORARY}*"):
            stale.unlink()
        files = sorted(root.iterdir(), key=lambda file: file.stat().st_mtime)
        self._sizes = {file.name: file.stat().st_size for file in files}
        self._make_room()

    def __contains__(self, pack_digest: str) -> bool:
        return _name(pack_digest) in self._sizes

    def read(self, pack_digest: str) -> bytearray | None:
        """The verified bytes; None when they are not here. A damaged file is removed, logged, and not here."""
        name = _name(pack_digest)
        try:
            with (self._root / name).open("rb") as file:
                data = bytearray(os.fstat(file.fileno()).st_size)
                file.readinto(data)
                os.utime(file.fileno())  # not by name, which another worker may be evicting
        except FileNotFoundError:
            self._remove(name)
            return None
        if _digest(data) != pack_digest:
            log.error("disk cache: %s is damaged; it is removed and pulled again", self._root / name)
            self._remove(name)
            return None
        with self._lock:
            if name in self._sizes:
                self._sizes[name] = self._sizes.pop(name)
        return data

    def kept(self, pack_digest: str) -> int:
        """Bytes of a broken pull that are kept here: where the next one goes on."""
        try:
            return self._partial(pack_digest).stat().st_size
        except FileNotFoundError:
            return 0

    def write(self, pack_digest: str, pieces: Iterable[bytes]) -> bytearray:
        """Store the pieces as they come, after those that are `kept`; return them all as one.

        When the pieces break off, what came is kept. Raises DataLoss, and keeps nothing, when they are not what was
        asked for. One writer at a time for a digest.
        """
        name, partial = _name(pack_digest), self._partial(pack_digest)
        data = bytearray(partial.read_bytes() if partial.exists() else b"")
        with partial.open("ab", buffering=0) as file:
            try:
                for piece in pieces:
                    _write_all(file, piece)
                    data += piece
                if (found := _digest(data)) != pack_digest:
                    raise DataLoss("DIGEST_MISMATCH", f"pulled {pack_digest}, but got bytes of {found}; pull again")
                partial.rename(self._root / name)
            except (DataLoss, OSError):
                partial.unlink(missing_ok=True)
                raise
        with self._lock:
            self._sizes[name] = len(data)
        self._make_room(keep=name)
        return data

    def drop(self, pack_digest: str) -> None:
        """Remove it, and what is kept of a broken pull. A worker that reads it now reads on."""
        self._remove(_name(pack_digest))
        self._partial(pack_digest).unlink(missing_ok=True)

    def _partial(self, pack_digest: str) -> Path:
        return self._root / f"{_TEMPORARY}{_name(pack_digest)}"

    def _make_room(self, keep: str = "") -> None:
        while True:
            with self._lock:
                oldest = next((name for name in self._sizes if name != keep), None)
                if sum(self._sizes.values()) <= self._max_bytes or oldest is None:
                    return
            self._remove(oldest)

    def _remove(self, name: str) -> None:
        with self._lock:
            self._sizes.pop(name, None)
        (self._root / name).unlink(missing_ok=True)


def _name(pack_digest: str) -> str:
    return pack_digest.removeprefix("sha256:")


def _write_all(file: RawIOBase, piece: bytes) -> None:
    """Write a piece to an unbuffered file: what is kept is on disk, whatever comes after."""
    view = memoryview(piece)
    while view:
        view = view[file.write(view) or 0 :]


def _digest(data: bytearray) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
