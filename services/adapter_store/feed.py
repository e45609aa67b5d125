"""Changes as they happen, for any number of watchers: one reader of the index a process, fanned out.

The reader looks at the index's position when this process changed something, and POLL_SECONDS after it last did, as
other processes change the same index. What is new goes into a ring that all watchers read at their own pace; a watcher
that is further behind than the ring reads the index's own feed, and one behind that is reset: it lists again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Self

from services.adapter_store.index.interface import Change, Index, Position
from services.adapter_store.journal import Journal
from services.common.errors import MultiloraError, Unavailable

# A change of another process is seen within this, and twice this with a slow index.
POLL_SECONDS = 0.1
HEARTBEAT_SECONDS = 1.0
_RING = 1000
_BATCH = 500

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reset:
    """List again, then go on from `position`."""

    position: Position


@dataclass(frozen=True, slots=True)
class Heartbeat:
    position: Position


@dataclass(frozen=True, slots=True)
class Changed:
    epoch: str
    change: Change


Event = Reset | Heartbeat | Changed


class Feed:
    """Lives on one event loop: enter the context there; leaving it ends every watch with Unavailable."""

    def __init__(
        self,
        journal: Journal,
        index: Index,
        *,
        heartbeat: float = HEARTBEAT_SECONDS,
        on_reach: Callable[[bool], Awaitable[None]] | None = None,
    ) -> None:
        """on_reach: told whether the index answers, each time that changes; it does at the start."""
        self._journal = journal
        self._index = index
        self._heartbeat = heartbeat
        self._on_reach = on_reach
        self._ring: deque[Change] = deque(maxlen=_RING)
        self._position: Position
        self._poke: asyncio.Event
        self._news: asyncio.Event
        self._closed = False

    async def __aenter__(self) -> Self:
        self._poke, self._news = asyncio.Event(), asyncio.Event()
        self._position = await asyncio.to_thread(self._index.position)
        loop = asyncio.get_running_loop()

        def poke() -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended before the last commit did
                loop.call_soon_threadsafe(self._poke.set)

        self._journal.on_commit = poke
        self._reader = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._journal.on_commit = None
        self.close()
        self._reader.cancel()
        await asyncio.wait([self._reader])

    def close(self) -> None:
        """End every watch, so that a server can stop."""
        self._closed = True
        self._wake()

    async def watch(self, after: int, epoch: str) -> AsyncIterator[Event]:
        """Every change above revision `after` of `epoch`, in order, for ever. Raises Unavailable when closed."""
        while not self._closed:
            news, position = self._news, self._position
            if epoch != position.epoch or after > position.revision:
                yield Reset(position)
                after, epoch = position.revision, position.epoch
                continue
            batch = await self._after(after, position)
            if batch is None:
                epoch = ""  # too far behind, or of an epoch that ended meanwhile
                await self._look()
                continue
            for change in batch:
                yield Changed(epoch, change)
                after = change.revision
            if batch:
                continue
            try:
                await asyncio.wait_for(news.wait(), self._heartbeat)
            except TimeoutError:
                yield Heartbeat(self._position if self._position.epoch == epoch else Position(epoch, after))
        raise Unavailable("STORE_STOPPING", "this adapter store stops; watch another, or again soon", retry_after=1.0)

    async def _after(self, after: int, position: Position) -> list[Change] | None:
        if after == position.revision:
            return []
        if self._ring and self._ring[0].revision <= after + 1:
            return [change for change in self._ring if change.revision > after]
        return await asyncio.to_thread(self._read, after, position.epoch)

    def _read(self, after: int, epoch: str) -> list[Change] | None:
        """From the index's own feed; None when it does not reach back that far or is of another epoch."""
        changes = self._index.changes(after, _BATCH)
        return changes if self._index.position().epoch == epoch else None

    async def _run(self) -> None:
        away = was_away = False
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poke.wait(), POLL_SECONDS)
            self._poke.clear()
            try:
                await self._look()
                away = False
            except MultiloraError as error:
                if not away:
                    log.warning("the feed of changes waits: %s", error)
                away = True
            except Exception:
                log.exception("the feed of changes failed")
            if away != was_away and self._on_reach is not None:
                await self._on_reach(not away)
            was_away = away

    async def _look(self) -> None:
        """Take in what is new."""
        last, now = self._position, await asyncio.to_thread(self._index.position)
        if now.epoch == last.epoch and now.revision < last.revision:
            log.warning("the index went back from revision %d to %d; it is healed", last.revision, now.revision)
            now = await asyncio.to_thread(self._heal, now.epoch)
        elif self._index.suspect():
            log.warning("the index may have lost entries; it is compared with the log")
            await asyncio.to_thread(self._journal.heal)
            now = await asyncio.to_thread(self._index.position)
        if now.epoch != last.epoch:
            self._take(now, [], fresh=True)
            return
        while last.revision < now.revision:
            changes = await asyncio.to_thread(self._read, last.revision, last.epoch)
            if self._position != last:
                return  # another look was faster
            if not changes:
                self._take(now, [], fresh=True)
                return
            last = Position(last.epoch, changes[-1].revision)
            self._take(last, changes)

    def _heal(self, epoch: str) -> Position:
        self._journal.heal()
        return self._index.renew(epoch)

    def _take(self, position: Position, changes: list[Change], *, fresh: bool = False) -> None:
        if fresh:
            self._ring.clear()
        self._ring.extend(changes)
        self._position = position
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
