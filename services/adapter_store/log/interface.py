"""What a log backend offers: the store's truth, beside the blobs. Everything else can be made again from it.

A log is a set of streams, one for each adapter and base model, each a row of immutable entries numbered 1, 2, 3 …

    log/adapters/<tenant>/<name>/<seq, 12 digits>.json      stream `adapters/<tenant>/<name>`
    log/base_models/<name>/<seq, 12 digits>.json            stream `base_models/<name>`

Creating entry N + 1 exclusively is the store's compare-and-set: of two writers one is told that it is there already.
Entries are opaque bytes here (log/entry.py writes and reads them) and begin with an id of their own, so that a writer
whose answer was lost can tell its own entry from another's. `tests/contracts/test_log.py` is what every backend passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """A stream and how far it goes. count < last means that entries are missing."""

    stream: str
    last: int
    count: int


class AdapterLog(Protocol):
    """All streams of one store. Safe to use from several threads, and by several processes at once."""

    def append(self, stream: str, seq: int, data: bytes) -> bool:
        """Create entry `seq` (from 1) durably, whole or not at all; False when it exists, also if with the same bytes.

        The caller sees to it that seq - 1 exists. Raises ResourceExhausted, Unavailable.
        """

    def read(self, stream: str, seq: int) -> bytes | None:
        """One entry; None when it is not there. Raises Unavailable."""

    def streams(self) -> Iterator[StreamInfo]:
        """Every stream with its last entry, from names alone: no entry is read. In no order; memory stays flat."""

    def close(self) -> None: ...
