"""What a blob backend offers. Blobs are named by their digest, so they never change once they are there.

A blob is always staged on local disk, whatever the backend: a pack is written in any order, and hashed when it is
whole. `commit` then makes it durable where blobs live. `tests/contracts/test_blobs.py` is what every backend passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self


class PartialBlob(Protocol):
    """A blob being written: nothing is visible before `commit`, and leaving the `with` block discards what is not."""

    size: int

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    @property
    def digest(self) -> str:
        """Digest of the bytes written so far."""

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. Raises ResourceExhausted when the disk is full."""

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes anywhere, from any thread; what was written nowhere is zeros. Raises ResourceExhausted.

        A blob is written either so, or from start to end: `write` may not follow it.
        """

    def read(self) -> bytes:
        """All that was written; for small blobs."""

    def map(self) -> memoryview:
        """A read-only view of all that was written, paged in as it is read. Freed with its last reference."""

    def sync(self) -> None:
        """Do the part of a commit that shows nothing, where there is one: while other threads go on with the bytes."""

    def commit(self, *, keep: bool = False) -> str:
        """Make the bytes durable under their digest, which is returned; the staged file is gone after it.

        keep: it stays until `discard`, so that the bytes can be committed again.

        A blob that is there already counts as written just now: its age, by which a collection spares what is young,
        starts again. A reader sees a whole blob or none.
        Raises DataLoss when other bytes arrived than were written, ResourceExhausted, Unavailable.
        """

    def discard(self) -> None:
        """Remove the staged file; of a committed blob nothing is lost. May be called more than once."""


class BlobReader(Protocol):
    """A committed blob, open for reading at any offset, by several threads."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`: fewer only at the end, none beyond it. Raises NotFound, Unavailable."""

    def read_now(self, buffer: memoryview, offset: int) -> int | None:
        """As `read`, into `buffer`, if that takes no waiting: how many bytes it read; None when it may."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """A committed blob. modified_ns: when it was last committed, nanoseconds since 1970 by the backend's clock."""

    digest: str
    size: int
    modified_ns: int


class Blobs(Protocol):
    """All blobs of one store. Safe to use from several threads, and by several processes at once."""

    def create(self) -> PartialBlob:
        """Stage a new blob."""

    def open(self, digest: str) -> BlobReader:
        """Open a committed blob. Raises NotFound (`BLOB_NOT_FOUND`), Unavailable."""

    def list(self) -> Iterator[BlobInfo]:
        """Every committed blob, in no order; memory stays flat."""

    def delete(self, digest: str, *, before_ns: int) -> bool:
        """Remove a blob last committed before a time; True when it was removed.

        False when it is younger or not there. A commit of the same digest meanwhile wins: it finds the blob removed
        and writes it, or makes it young.
        """

    def total_bytes(self) -> int:
        """Size of all committed blobs together, in bytes."""

    def close(self) -> None: ...
