"""Reading blobs from S3: ranges of a fixed size, fetched ahead in parallel, in a bounded number of buffers.

All readers of a store share one RangePool. A reader asks for the range it needs and for the next few; whoever reads
the same blob at about the same place, as many replicas do after a promotion, shares the buffer and the request.
When all buffers are taken, a reader fetches just the bytes it was asked for, into no buffer: slow readers that hold
theirs make others slower, and never make them wait. Memory is buffers × range_bytes, however many read.

    reader A   ──────[ 3 ][ 4 ][ 5 ][ 6 ]            [n] one range: in flight or whole, with a count of its users
    reader B   ───[ 2 ][ 3 ][ 4 ][ 5 ]               one without users stays while somebody reads and room is left
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from services.adapter_store.s3 import S3Bucket, backoff
from services.adapter_store.s3_errors import ObjectMissing, Taken
from services.common.errors import Cancelled, DataLoss, NotFound

RANGE_BYTES = 8 << 20
BUFFERS = 8  # 64 MiB: two readers at full speed, or more that share
AHEAD = 4
_READ_BYTES = 256 << 10  # what a connection that stalls may lose

Fetch = Callable[[str, int, int], mmap.mmap]


class _Range:
    def __init__(self, key: tuple[str, int], future: Future[mmap.mmap]) -> None:
        self.key = key
        self.future = future
        self.users = 0


class RangePool:
    """The buffers, and the threads that fill them. Safe to use from several threads."""

    def __init__(
        self, fetch: Fetch, *, range_bytes: int = RANGE_BYTES, buffers: int = BUFFERS, ahead: int = AHEAD
    ) -> None:
        self.fetch = fetch
        self.range_bytes = range_bytes
        self._buffers = buffers
        self._ahead = ahead
        self._threads = ThreadPoolExecutor(2 * ahead, "s3-range")
        self._lock = threading.RLock()  # a future that is done at once calls back at once
        self._ranges: dict[tuple[str, int], _Range] = {}  # those without users least recently used first
        self._readers = 0
        self.most_held = 0

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    @property
    def held(self) -> int:
        """Buffers that are filled or being filled."""
        return len(self._ranges)

    def ahead(self) -> int:
        """How many ranges a reader may hold: fewer when many read, so that each gets some."""
        return max(1, min(self._ahead, self._buffers // max(self._readers, 1)))

    def enter(self) -> None:
        with self._lock:
            self._readers += 1

    def leave(self) -> None:
        with self._lock:
            self._readers -= 1
            self._drop_unused()

    def acquire(self, name: str, index: int, size: int) -> _Range | None:
        """Range `index` of a blob of `size` bytes, in flight or whole; None when every buffer is in use."""
        key = (name, index)
        with self._lock:
            held = self._ranges.get(key)
            if held is None or _failed(held):
                if held is None and not self._make_room():
                    return None
                start = index * self.range_bytes
                stop = min(start + self.range_bytes, size)
                held = self._ranges[key] = _Range(key, self._threads.submit(self.fetch, name, start, stop))
                self.most_held = max(self.most_held, len(self._ranges))
                held.future.add_done_callback(self._fetched)
            held.users += 1
            return held

    def release(self, held: _Range) -> None:
        with self._lock:
            held.users -= 1
            if held.users == 0 and self._ranges.get(held.key) is held:
                self._ranges[held.key] = self._ranges.pop(held.key)  # now the most recently used
                self._drop_unused()

    def _fetched(self, _: Future[mmap.mmap]) -> None:
        with self._lock:
            self._drop_unused()  # it may have been for a reader that has left

    def _make_room(self) -> bool:
        """Whether one more range fits, if need be for the least recently used one."""
        if len(self._ranges) < self._buffers:
            return True
        for key, held in self._ranges.items():
            if held.users == 0 and held.future.done():
                del self._ranges[key]
                return True
        return False

    def _drop_unused(self) -> None:
        """Without readers, forget everything that nobody uses; what is in flight still counts until it has come."""
        if self._readers:
            return
        for key, held in list(self._ranges.items()):
            if held.users == 0 and (held.future.done() or held.future.cancel()):
                self._ranges.pop(key, None)


class S3Reader:
    """A committed blob, open for reading at any offset; the faster the more in order. Safe in several threads."""

    def __init__(self, pool: RangePool, name: str, size: int) -> None:
        self.size = size
        self._pool = pool
        self._name = name
        self._lock = threading.Lock()
        self._window: dict[int, _Range] = {}
        self._closed = False
        pool.enter()

    def read(self, offset: int, length: int) -> bytes:
        stop = min(offset + length, self.size)
        pieces = []
        while offset < stop:
            index, begin = divmod(offset, self._pool.range_bytes)
            end = min(begin + stop - offset, self._pool.range_bytes)
            held = self._advance(index)
            if held is None:
                pieces.append(bytes(self._pool.fetch(self._name, offset, offset + end - begin)))
            else:
                try:
                    pieces.append(bytes(memoryview(held.future.result())[begin:end]))
                finally:
                    self._pool.release(held)
            offset += end - begin
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_now(self, buffer: memoryview, offset: int) -> int | None:  # noqa: ARG002
        """None: a range is waited for, or at least looked up under locks."""
        return None

    def close(self) -> None:
        """A read that is under way ends as if nothing had happened; later ones are refused."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for held in self._window.values():
                self._pool.release(held)
            self._window.clear()
        self._pool.leave()

    def _advance(self, index: int) -> _Range | None:
        """Range `index`, held once more for the caller; the window is moved to start with it."""
        with self._lock:
            if self._closed:
                raise Cancelled("READ_ENDED", "the blob's reader was closed")
            wanted = range(index, min(index + self._pool.ahead(), -(-self.size // self._pool.range_bytes)))
            for passed in [other for other in self._window if other not in wanted]:
                self._pool.release(self._window.pop(passed))
            for each in wanted:
                known = self._window.get(each)
                if known is not None and not _failed(known):
                    continue
                held = self._pool.acquire(self._name, each, self.size)
                if held is None:
                    break  # a later one would take the buffer that the next one needs
                if known is not None:
                    self._pool.release(known)
                self._window[each] = held
            if index not in self._window or _failed(self._window[index]):
                return None
            return self._pool.acquire(self._name, index, self.size)


def fetch_range(bucket: S3Bucket, name: str, start: int, stop: int, *, etag: str | None = None) -> mmap.mmap:
    """Bytes [start, stop) of an object; a connection that breaks is resumed where it broke.

    Raises NotFound, Unavailable, FailedPrecondition as S3Bucket does, DataLoss when the object is shorter, Taken when
    it has another ETag than the one that is asked for.
    """
    from botocore.exceptions import BotoCoreError

    buffer = mmap.mmap(-1, stop - start)
    rest = memoryview(buffer)
    why: object = ""
    for attempt in range(bucket.config.attempts):
        if attempt:
            backoff(attempt)
        first = stop - len(rest)
        body = _open(bucket, name, first, stop, etag)
        try:
            with contextlib.closing(body):
                while rest and (count := body.readinto(rest[:_READ_BYTES])):
                    rest = rest[count:]
        except BotoCoreError as error:
            why = error
        if not rest:
            return buffer
    raise bucket.unavailable("read", name, why or "the connection ends early each time")


def _open(bucket: S3Bucket, name: str, start: int, stop: int, etag: str | None) -> Any:
    try:
        with bucket.errors("read", name):
            answer = bucket.client.get_object(**bucket.location(name), Range=f"bytes={start}-{stop - 1}")
    except ObjectMissing:
        raise blob_not_found(name) from None
    except Taken:
        raise _truncated(bucket, name, start, stop) from None
    if etag not in (None, answer["ETag"]):  # no If-Match, which not every server honours
        answer["Body"].close()
        raise Taken(name)
    if answer.get("ContentRange", "").split("/")[0] != f"bytes {start}-{stop - 1}":
        answer["Body"].close()
        raise _truncated(bucket, name, start, stop)
    return answer["Body"]


def _truncated(bucket: S3Bucket, name: str, start: int, stop: int) -> DataLoss:
    return DataLoss(
        "BLOB_TRUNCATED",
        f"{bucket.config.uri}/{name} has no bytes {start} to {stop - 1}; verify the store, register it again",
    )


def blob_not_found(name: str) -> NotFound:
    return NotFound("BLOB_NOT_FOUND", f"there are no bytes at {name}; resolve the adapter again")


def _failed(held: _Range) -> bool:
    return held.future.done() and (held.future.cancelled() or held.future.exception() is not None)
