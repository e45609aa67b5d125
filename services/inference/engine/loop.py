"""The engine's own thread: takes what came in, steps, sends out what there is to tell, one message batch per step."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence

from services.inference.engine.engine import Engine
from services.inference.engine.messages import (
    AbortRequest,
    AdaptersChanged,
    AddRequest,
    DropVersion,
    EngineDied,
    EngineInput,
    EngineOutput,
    GetStats,
    LoadAdapter,
    Prefetch,
    RankDied,
    Shutdown,
    StatsReply,
    UnloadAdapter,
    UnpinAdapter,
)

log = logging.getLogger(__name__)

MAX_SLEEP = 3600.0
"""Seconds. A caller's deadline may be centuries away, which is more than a queue can be told to wait."""


RETRY_SLEEP = 0.001
"""Seconds until the next step when requests are ready and none could run: a slot or a turn is about to be free."""


class RankDiedError(RuntimeError):
    """A process that computes a part of the model has ended."""


class EngineLoop:
    """Runs an engine until it is told to shut down. `inbox` may be filled by any thread.

    emit: called with every step's outputs, from the loop's thread
    close: called when the loop has ended, to let go of what the runner holds
    """

    def __init__(
        self, engine: Engine, inbox: queue.SimpleQueue[EngineInput], close: Callable[[], None] = lambda: None
    ) -> None:
        self.engine = engine
        self.inbox = inbox
        self._close = close
        self.emit: Callable[[Sequence[EngineOutput]], None] = lambda _outputs: None
        self._shutdown: Shutdown | None = None

    def run(self) -> None:
        try:
            progress = False
            while True:
                self._receive(wait=not progress)
                if self._shutdown is not None and not (self._shutdown.drain and self.engine.has_requests):
                    break
                outputs = self.engine.step()
                progress = self.engine.moved or bool(outputs)
                if outputs:
                    self.emit(outputs)
            self._cancel_all()
        except Exception as error:
            log.exception("the engine died")
            self.emit([EngineDied(repr(error))])
        finally:
            self.engine.adapters.close()
            self._close()

    def _receive(self, *, wait: bool) -> None:
        """Handle everything in the inbox; with `wait`, first sleep until something comes or a deadline passes."""
        if wait:
            waits = [MAX_SLEEP]
            if (deadline := self.engine.next_deadline()) is not None:
                waits.append(deadline)
            if self.engine.scheduler.has_work:
                waits.append(RETRY_SLEEP)
            try:
                self._handle(self.inbox.get(timeout=min(waits)))
            except queue.Empty:
                return
        while True:
            try:
                message = self.inbox.get_nowait()
            except queue.Empty:
                return
            self._handle(message)

    def _handle(self, message: EngineInput) -> None:
        match message:
            case AddRequest():
                self.engine.add(message)
            case AbortRequest(request_id):
                self.engine.abort(request_id)
            case GetStats(reply_id):
                self.emit([StatsReply(reply_id, self.engine.stats())])
            case Prefetch(adapter):
                self.engine.adapters.prefetch(adapter)
            case DropVersion(name, version):
                self.engine.adapters.drop(name, version)
            case LoadAdapter() | UnpinAdapter() | UnloadAdapter():
                self.engine.control.handle(message)
            case AdaptersChanged():
                pass  # being awake is all it asks; the next step polls
            case RankDied(reason):
                raise RankDiedError(reason)
            case Shutdown():
                self._shutdown = message

    def _cancel_all(self) -> None:
        for request in list(self.engine.scheduler.requests()):
            self.engine.abort(request.request_id)
        self.engine.settle()
        if outputs := self.engine.take_outputs():
            self.emit(outputs)
