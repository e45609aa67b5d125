"""Content-addressed blobs in a directory. A blob's name is its digest, so it never changes once it is there.

    <root>/lock                        held with flock, shared, by every process that uses the directory
    <root>/sweep.lock                  held with flock: shared while a blob gets its name, alone while one is removed
    <root>/tmp/<32 hex>.part           being written; whatever is here when the first process starts is left over
    <root>/blobs/sha256/ab/<64 hex>    committed; `ab` are the digest's first two digits; its mtime is its last commit
    <root>/log/                        what names mean (log/interface.py)
    <root>/index.sqlite3               the same, fast (index/sqlite.py), with its -wal and -shm

Commit order: write under tmp/, synced behind the writer's back as it grows → fsync → verify → link to the final name,
or renew the mtime of what has it → fsync its directory → remove the name in tmp/. A reader sees a whole blob or none,
and a crash leaves only tmp/ behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Self

from services.adapter_store.blobs.interface import BlobInfo
from services.adapter_store.files import disk_full, fsync_directory, make_directory
from services.adapter_store.steps import commit_step
from services.common.errors import DataLoss, NotFound

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# As much is written before the disk is set to work: a commit then has little left to wait for.
_SYNC_BYTES = 8 << 20
_SYNC_THREADS = 2


class PartialBlob:
    """A blob being written: nothing is visible before `commit`, and leaving the `with` block discards what is not."""

    def __init__(self, blobs: DiskBlobs, path: Path) -> None:
        self.path = path
        self.size = 0
        self._blobs = blobs
        self._hash = hashlib.sha256()
        self._hashed = 0  # bytes from the start on; other than `size` when some were written out of order
        self._syncing: Future[None] | None = None
        self._sync_at = _SYNC_BYTES
        self._lock = threading.Lock()
        # unbuffered: a full disk shows at the write that fills it, and closing never writes
        with disk_full():
            self._file = path.open("xb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.discard()

    @property
    def digest(self) -> str:
        """Digest of the bytes written so far."""
        if self._hashed != self.size:
            with self.path.open("rb") as file:
                self._hash = hashlib.file_digest(file, "sha256")
            self._hashed = self.size
        return f"sha256:{self._hash.hexdigest()}"

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. Raises ResourceExhausted when the disk is full."""
        self._write(data, self.size)
        self._hash.update(data)
        self._hashed += len(data)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes anywhere, from any thread; what was written nowhere is zeros. Raises ResourceExhausted."""
        self._hashed = -1
        self._write(data, offset)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        rest = memoryview(data)
        with disk_full():
            while rest:
                count = os.pwrite(self._file.fileno(), rest, offset)
                rest, offset = rest[count:], offset + count
        with self._lock:
            self.size = max(self.size, offset)
            if self.size >= self._sync_at:
                self._sync_ahead()

    def read(self) -> bytes:
        """All that was written; for small blobs."""
        return self.path.read_bytes()

    def map(self) -> memoryview:
        """A read-only view of all that was written, paged in as it is read. Freed with its last reference."""
        if self.size == 0:
            return memoryview(b"")
        with self.path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def sync(self) -> None:
        """Bytes written so far are on the disk; a commit has little left to wait for."""
        with disk_full():
            self._synced_ahead()
            os.fsync(self._file.fileno())

    def commit(self, *, keep: bool = False) -> str:
        """Make the bytes durable under their digest, which is returned. Raises DataLoss when the disk holds others."""
        self.sync()
        on_disk = os.fstat(self._file.fileno()).st_size
        if on_disk != self.size:
            raise DataLoss("SHORT_WRITE", f"wrote {self.size} bytes, the disk holds {on_disk}; check the disk")
        final = self._blobs.path(self.digest)
        with disk_full():
            make_directory(final.parent)
            commit_step("blobs.disk.synced")
            with self._blobs.sweep_lock(fcntl.LOCK_SH):
                with contextlib.suppress(FileExistsError):
                    os.link(self.path, final)
                now = time.time_ns()  # the kernel's own stamp is some milliseconds behind
                os.utime(final, ns=(now, now))  # its age counts from its last commit
            commit_step("blobs.disk.linked")
            # also when it existed: whoever linked it may not have come as far as this
            fsync_directory(final.parent)
        digest = self.digest
        if not keep:
            self.discard()
        return digest

    def discard(self) -> None:
        """Remove the temporary name; of a committed blob nothing is lost."""
        if self._syncing is not None:
            wait([self._syncing])  # its descriptor may be another file's once it is closed
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _sync_ahead(self) -> None:
        """Have the disk begin with what is written, unless it is at it still."""
        if self._syncing is not None and not self._syncing.done():
            return
        with disk_full():
            self._synced_ahead()
        self._syncing = self._blobs.sync_threads.submit(os.fdatasync, self._file.fileno())
        self._sync_at = self.size + _SYNC_BYTES

    def _synced_ahead(self) -> None:
        """Wait for the disk. The kernel tells of bytes that it lost once: to the sync behind the writer's back."""
        if self._syncing is not None:
            self._syncing.result()


class DiskBlobs:
    """All blobs beneath one directory. Safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        """Open or make the directory; the first process to use it removes what a crash left."""
        self.root = root
        self._tmp = root / "tmp"
        self._blobs = root / "blobs" / "sha256"
        for directory in (self._tmp, self._blobs):
            make_directory(directory)
        self._lock = _share(root / "lock", self._remove_leftovers)
        self.sync_threads = ThreadPoolExecutor(_SYNC_THREADS, "sync")

    def close(self) -> None:
        self.sync_threads.shutdown()
        os.close(self._lock)

    def path(self, digest: str) -> Path:
        assert _DIGEST.fullmatch(digest), digest
        hexadecimal = digest.removeprefix("sha256:")
        return self._blobs / hexadecimal[:2] / hexadecimal

    def create(self) -> PartialBlob:
        return PartialBlob(self, self._tmp / f"{secrets.token_hex(16)}.part")

    def open(self, digest: str) -> BlobReader:
        """Open a committed blob. Raises NotFound."""
        return BlobReader(self.path(digest), digest)

    def list(self) -> Iterator[BlobInfo]:
        for shard in os.scandir(self._blobs):
            for blob in os.scandir(shard):
                try:
                    stat = blob.stat()
                except FileNotFoundError:  # removed since
                    continue
                yield BlobInfo(f"sha256:{blob.name}", stat.st_size, stat.st_mtime_ns)

    def delete(self, digest: str, *, before_ns: int) -> bool:
        path = self.path(digest)
        with self.sweep_lock(fcntl.LOCK_EX):
            try:
                if path.stat().st_mtime_ns >= before_ns:
                    return False
                path.unlink()
            except FileNotFoundError:
                return False
        return True

    def total_bytes(self) -> int:
        return sum(blob.size for blob in self.list())

    @contextlib.contextmanager
    def sweep_lock(self, kind: int) -> Iterator[None]:
        """Keep removals and commits apart, among threads and processes: a lock belongs to the file opened for it."""
        fd = os.open(self.root / "sweep.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, kind)
            yield
        finally:
            os.close(fd)

    def _remove_leftovers(self) -> None:
        for leftover in self._tmp.iterdir():
            leftover.unlink()


class BlobReader:
    """A committed blob, open for reading at any offset. Stays readable when the blob is removed meanwhile."""

    def __init__(self, path: Path, digest: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound("BLOB_NOT_FOUND", f"there are no bytes for {digest}; resolve the adapter again") from None
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def read_now(self, buffer: memoryview, offset: int) -> int | None:
        """What the page cache holds: a thread to wait in costs more than the bytes do."""
        if not hasattr(os, "RWF_NOWAIT"):  # Linux only
            return None
        try:
            return os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:  # not there yet, or a file system that cannot tell
            return None

    def close(self) -> None:
        os.close(self._fd)


def _share(path: Path, alone: Callable[[], None]) -> int:
    """Hold `path` with flock, shared; `alone` runs first when no other process holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone()
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd
