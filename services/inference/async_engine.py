"""The engine as asyncio sees it: it runs in a thread of its own, and each request's outputs come as a stream."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence

from services.common.errors import Internal, MultiloraError, Unavailable
from services.inference.engine.loop import EngineLoop
from services.inference.engine.messages import (
    AbortRequest,
    AdapterReply,
    AddRequest,
    DropVersion,
    EngineDied,
    EngineInput,
    EngineOutput,
    EngineStats,
    GetStats,
    LoadAdapter,
    Prefetch,
    RequestOutput,
    RequestStarted,
    Shutdown,
    StatsReply,
    UnloadAdapter,
    UnpinAdapter,
)
from services.inference.engine.request import AdapterVersion

log = logging.getLogger(__name__)

Stream = asyncio.Queue[RequestStarted | RequestOutput | EngineDied]


class AsyncEngine:
    """Sends inputs to the engine's thread and hands its outputs, coalesced per step, to whoever waits for them."""

    def __init__(self, engine: EngineLoop) -> None:
        self._engine = engine
        self.loop = asyncio.get_running_loop()
        self._streams: dict[str, Stream] = {}
        self._last_words_due: Counter[str] = Counter()
        self._replies: dict[int, asyncio.Future[StatsReply | AdapterReply]] = {}
        self._reply_ids = itertools.count()
        self._death: EngineDied | None = None
        self.died = asyncio.Event()
        self._stopping = False
        engine.emit = self._emit
        self._thread = threading.Thread(target=engine.run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_serving(self) -> bool:
        """Whether new requests are taken: the engine lives and is not shutting down."""
        return self._death is None and not self._stopping

    def in_flight(self, request_id: str) -> bool:
        return request_id in self._streams

    async def generate(self, add: AddRequest) -> AsyncGenerator[RequestStarted | RequestOutput, None]:
        """Outputs of one request, the last one with `finished`. Closing it early aborts the request."""
        self._check_alive()
        if self._stopping:
            raise Unavailable("SHUTTING_DOWN", "this replica is shutting down; ask another")
        stream: Stream = asyncio.Queue()
        self._streams[add.request_id] = stream
        self._send(add)
        done = False
        try:
            while not done:
                output = await stream.get()
                if isinstance(output, EngineDied):
                    done = True
                    self._check_alive()
                    return
                done = _is_last(output)
                yield output
        finally:
            del self._streams[add.request_id]
            if not done:
                self._abort(add.request_id, stream)

    def prefetch(self, adapter: AdapterVersion) -> None:
        """Bring a version to host memory before anyone asks for it."""
        self._send(Prefetch(adapter))

    def drop(self, name: str, version: int) -> None:
        """Let go of a deleted version."""
        self._send(DropVersion(name, version))

    async def stats(self) -> EngineStats:
        """The engine's truth, read between two steps."""
        reply = await self._ask(GetStats)
        assert isinstance(reply, StatsReply)
        return reply.stats

    async def load(self, adapter: AdapterVersion, *, pin: bool = False) -> str:
        """Bring a version here, and keep it with `pin`; the tier it came to. Raises what kept it away."""
        return (await self._command(lambda reply_id: LoadAdapter(reply_id, adapter, pin))).tier

    async def unpin(self, adapter: AdapterVersion) -> None:
        await self._command(lambda reply_id: UnpinAdapter(reply_id, adapter))

    async def unload(self, name: str, version: int | None, timeout: float | None) -> int:
        """Drain and evict; the number of requests cancelled after `timeout` seconds."""
        return (await self._command(lambda reply_id: UnloadAdapter(reply_id, name, version, timeout))).cancelled

    async def _command(self, message: Callable[[int], EngineInput]) -> AdapterReply:
        reply = await self._ask(message)
        assert isinstance(reply, AdapterReply)
        if reply.error is not None:
            raise reply.error
        return reply

    async def _ask(self, message: Callable[[int], EngineInput]) -> StatsReply | AdapterReply:
        """Send a message that is answered, under a new reply id."""
        self._check_alive()
        if not self._thread.is_alive():
            raise Unavailable("SHUTTING_DOWN", "this replica is shutting down; ask another")
        reply_id = next(self._reply_ids)
        future: asyncio.Future[StatsReply | AdapterReply] = self.loop.create_future()
        self._replies[reply_id] = future
        self._send(message(reply_id))
        try:
            return await future
        finally:
            del self._replies[reply_id]

    def check_integrity(self) -> None:
        """For tests, from the engine's own thread: raise AssertionError unless its books agree."""
        self._engine.engine.check_integrity()

    async def shutdown(self, *, drain: bool, timeout: float) -> None:
        """Take no new requests; finish (or, without `drain` or past `timeout` seconds, cancel) those there are."""
        self._stopping = True
        for step in [drain, False] if drain else [False]:
            self._send(Shutdown(step))
            await asyncio.to_thread(self._thread.join, timeout)
            if not self._thread.is_alive():
                self._fail_replies(Unavailable("SHUTTING_DOWN", "this replica is shutting down; ask another"))
                return
        log.error("the engine did not stop within %.0f s", timeout)

    def _check_alive(self) -> None:
        if self._death is not None:
            raise Internal("ENGINE_DIED", f"the engine has died and this replica must restart: {self._death.error}")

    def _abort(self, request_id: str, stream: Stream) -> None:
        """Stop a request. What the engine still says about it, up to its last word, is not about the id's next one."""
        self._send(AbortRequest(request_id))
        unread = [stream.get_nowait() for _ in range(stream.qsize())]
        if not any(map(_is_last, unread)):
            self._last_words_due[request_id] += 1

    def _fail_replies(self, error: MultiloraError) -> None:
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)

    def _send(self, message: EngineInput) -> None:
        self._engine.inbox.put(message)

    def _emit(self, outputs: Sequence[EngineOutput]) -> None:
        """Called by the engine's thread, once per step."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: Sequence[EngineOutput]) -> None:
        for output in outputs:
            if isinstance(output, StatsReply | AdapterReply):
                reply = self._replies.get(output.reply_id)
                if reply is not None and not reply.done():
                    reply.set_result(output)
            elif isinstance(output, EngineDied):
                self._death = output
                self.died.set()
                for stream in self._streams.values():
                    stream.put_nowait(output)
                self._fail_replies(Internal("ENGINE_DIED", output.error))
            elif output.request_id in self._last_words_due:
                if _is_last(output):
                    self._last_words_due -= Counter([output.request_id])
            elif output.request_id in self._streams:
                self._streams[output.request_id].put_nowait(output)


def _is_last(output: RequestStarted | RequestOutput | EngineDied) -> bool:
    """Whether the engine will say nothing more about the request."""
    return isinstance(output, EngineDied) or (isinstance(output, RequestOutput) and output.finished is not None)
