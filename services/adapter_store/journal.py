"""The one way in which truth changes: an entry is appended to its log, then applied to the index.

    catch up → decide → append entry seq + 1, exclusively → apply to the index

A crash before the append leaves nothing; after it, the entry is true, and whoever comes next (`heal` at start, or the
next write to the stream) applies it. Of two writers the slower finds its entry there already, catches up, and decides
again on what is true then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.adapter_store.index.interface import Index, IndexWriter, Stored
from services.adapter_store.log.entry import Body, Entry, decode, encode
from services.adapter_store.log.interface import AdapterLog, StreamInfo
from services.adapter_store.steps import commit_step
from services.adapter_store.streams import State, fold, index_write, load_state
from services.common.errors import DataLoss

Clock = Callable[[], int]
_NOTHING = Stored(0, "")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Folded:
    """A stream caught up: its state after `seq` entries."""

    seq: int
    state: State


class Journal:
    """Log and index together. Safe in several threads; several processes may work on the same two.

    on_commit: called, from any thread, after a change was applied
    """

    def __init__(self, entries: AdapterLog, index: Index, *, clock: Clock = time.time_ns) -> None:
        self.entries = entries
        self.index = index
        self.clock = clock
        self.on_commit: Callable[[], None] | None = None
        self._healing = threading.Lock()

    def commit(self, stream: str, decide: Callable[[Folded], Body | None], *, actor: str) -> Folded:
        """Append what `decide` makes of the stream's last state, and apply it: the stream as it is then.

        `decide` may run again on a later state, and raises what refuses the change; None changes nothing.
        """
        while True:
            before = self.catch_up(stream)
            body = decide(before)
            if body is None:
                return before
            entry, seq = Entry(body, self.clock(), actor), before.seq + 1
            data = encode(entry)
            after = fold(before.state, entry)
            if not self.entries.append(stream, seq, data) and self.entries.read(stream, seq) != data:
                continue  # another's; our own is there too when the answer to its creation was lost
            commit_step("journal.appended")
            if self.index.apply(index_write(stream, seq, entry, after)) is None:
                self.catch_up(stream)  # another applied it already, or the index lost what came before it
            commit_step("journal.applied")
            if self.on_commit is not None:
                self.on_commit()
            return Folded(seq, after)

    def catch_up(self, stream: str) -> Folded:
        """Apply to the index what the log has beyond it: the stream as it is then."""
        return self._catch_up(stream, self.index)

    def _catch_up(self, stream: str, index: Index) -> Folded:
        stored = index.get(stream)
        seq = stored.seq if stored is not None else 0
        state = load_state(stream, stored.state if stored is not None else None)
        while (data := self.entries.read(stream, seq + 1)) is not None:
            seq += 1
            entry = decode(data, f"{stream}/{seq}")
            state = fold(state, entry)
            index.apply(index_write(stream, seq, entry, state))
        return Folded(seq, state)

    def heal(self) -> int:
        """Catch up every stream whose log is ahead of the index: how many there were.

        An index that lacks entries may have lost what Watch clients were told already, so it begins a new epoch; before
        anything else, as whoever goes on with this after a crash would not know. Raises DataLoss, as `check` does.
        """
        with self._healing, self.index.healing() as index:
            epoch = index.position().epoch
            behind = self._check(index)
            if behind:
                index.renew(epoch)
            for stream in behind:
                self._catch_up(stream, index)
            if behind:
                log.warning(
                    "the index lacked entries of %d streams, such as %s; it has them now", len(behind), behind[0]
                )
            return len(behind)

    def check(self) -> list[str]:
        """Compare how far log and index go, by names alone: the streams that the index lacks entries of.

        Raises DataLoss, naming a stream, when the index holds entries that the log has lost, or the log has a hole.
        """
        return self._check(self.index)

    def _check(self, index: Index) -> list[str]:
        applied, behind = dict(index.seqs()), dict[str, int]()
        for info in self.entries.streams():
            if info.count < info.last:
                missing = (seq for seq in range(1, info.last) if self.entries.read(info.stream, seq) is None)
                raise _hole(info.stream, next(missing, 0), info.last)
            seq = applied.pop(info.stream, 0)
            if seq > info.last:
                applied[info.stream] = seq
            elif seq < info.last:
                behind[info.stream] = info.last
        # the log's names were read after the index: what is there by now was only being written, either way
        lost = {stream: seq for stream, seq in applied.items() if self.entries.read(stream, seq) is None}
        if lost:
            raise _ahead(lost)
        return [stream for stream, last in behind.items() if (index.get(stream) or _NOTHING).seq < last]

    def rebuild(self) -> int:
        """Make the index anew from the log, in a new epoch: how many entries there are."""
        count = 0
        with self._healing, self.index.rebuild() as writer:
            for info in self.entries.streams():
                count += self._replay(info, writer)
        return count

    def replay(self, info: StreamInfo) -> Iterator[tuple[int, Entry, State]]:
        """Every entry of a stream as the log has it, with the state after it; the index is not asked.

        Raises DataLoss when entries are missing or broken.
        """
        stream, seq = info.stream, 0
        state = load_state(stream, None)
        while (data := self.entries.read(stream, seq + 1)) is not None:
            seq += 1
            entry = decode(data, f"{stream}/{seq}")
            state = fold(state, entry)
            yield seq, entry, state
        if seq < info.last:
            raise _hole(stream, seq + 1, info.last)

    def _replay(self, info: StreamInfo, writer: IndexWriter) -> int:
        seq = 0
        for seq, entry, state in self.replay(info):
            writer.apply(index_write(info.stream, seq, entry, state))
        return seq


def _hole(stream: str, missing: int, last: int) -> DataLoss:
    return DataLoss(
        "LOG_HOLE",
        f"the log has {stream}/{last}, but not entry {missing} before it; restore it from a copy",
        stream=stream,
    )


def _ahead(lost: dict[str, int]) -> DataLoss:
    stream, seq = min(lost.items())
    return DataLoss(
        "LOG_BEHIND_INDEX",
        f"the index knows {len(lost)} streams further than the log, such as {stream} to entry {seq}: the log was "
        "restored from an old copy, or is another store's; restore all of it, or run `multilora store reindex` to go "
        "on from what it has",
        stream=stream,
    )
