"""The engine as asyncio sees it: wherever it runs, each request's outputs come as a stream."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence

from services.common.errors import Internal, MultiloraError, Unavailable
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
from services.inference.hosting.interface import EngineHost
from services.inference.output_stream import OutputStream

log = logging.getLogger(__name__)


class AsyncEngine:
    """Sends inputs to the engine and hands its outputs, coalesced per step, to whoever waits for them.

    max_unread_tokens: how many of a request's may wait to be read
    death: how the engine died, if it has; `died` is set then
    """

    def __init__(self, host: EngineHost, max_unread_tokens: int = 4096) -> None:
        self.host = host
        self.loop = asyncio.get_running_loop()
        self._max_unread_tokens = max_unread_tokens
        self._streams: dict[str, OutputStream] = {}
        self._last_words_due: Counter[str] = Counter()
        self._replies: dict[int, asyncio.Future[StatsReply | AdapterReply]] = {}
        self._reply_ids = itertools.count()
        self.death: EngineDied | None = None
        self.died = asyncio.Event()
        self._stopping = False
        host.connect(self._deliver)

    @property
    def is_serving(self) -> bool:
        """Whether new requests are taken: the engine lives and is not shutting down."""
        return self.death is None and not self._stopping

    def in_flight(self, request_id: str) -> bool:
        return request_id in self._streams

    async def generate(self, add: AddRequest) -> AsyncGenerator[RequestStarted | RequestOutput, None]:
        """Outputs of one request, the last one with `finished`; those of several steps are one where the reader is
        slower than the engine. Closing it early aborts the request. Raises Internal (ENGINE_DIED) and, when it reads
        too slowly, ResourceExhausted (CLIENT_TOO_SLOW)."""
        self._check_alive()
        if self._stopping:
            raise Unavailable("SHUTTING_DOWN", "this replica is shutting down; ask another")
        stream = OutputStream(self._max_unread_tokens)
        self._streams[add.request_id] = stream
        self.host.send(add)
        last = False
        try:
            while not last:
                for output in await stream.take():
                    last = isinstance(output, RequestOutput) and output.finished is not None
                    yield output
        finally:
            del self._streams[add.request_id]
            if not stream.ended:
                self._abort(add.request_id)

    def prefetch(self, adapter: AdapterVersion) -> None:
        """Bring a version to host memory before anyone asks for it."""
        self.host.send(Prefetch(adapter))

    def drop(self, name: str, version: int) -> None:
        """Let go of a deleted version."""
        self.host.send(DropVersion(name, version))

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
        if not self.host.is_alive:
            raise Unavailable("SHUTTING_DOWN", "this replica is shutting down; ask another")
        reply_id = next(self._reply_ids)
        future: asyncio.Future[StatsReply | AdapterReply] = self.loop.create_future()
        self._replies[reply_id] = future
        self.host.send(message(reply_id))
        try:
            return await future
        finally:
            del self._replies[reply_id]

    async def shutdown(self, *, drain: bool, timeout: float) -> None:
        """Take no new requests; finish (or, without `drain` or past `timeout` seconds, cancel) those there are."""
        self._stopping = True
        for step in [drain, False] if drain else [False]:
            self.host.send(Shutdown(step))
            if await self.host.wait_ended(timeout):
                self._fail_replies(Unavailable("SHUTTING_DOWN", "this replica is shutting down; ask another"))
                return
        log.error("the engine did not stop within %.0f s", timeout)

    def _check_alive(self) -> None:
        if self.death is not None:
            raise self._death_error(self.death)

    def _abort(self, request_id: str) -> None:
        """Stop a request. What the engine still says about it, up to its last word, is not about the id's next one."""
        self.host.send(AbortRequest(request_id))
        self._last_words_due[request_id] += 1

    def _fail_replies(self, error: MultiloraError) -> None:
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)

    def _deliver(self, outputs: Sequence[EngineOutput]) -> None:
        for output in outputs:
            if isinstance(output, StatsReply | AdapterReply):
                reply = self._replies.get(output.reply_id)
                if reply is not None and not reply.done():
                    reply.set_result(output)
            elif isinstance(output, EngineDied):
                self._die(output)
            elif output.request_id in self._last_words_due:
                if isinstance(output, RequestOutput) and output.finished is not None:
                    self._last_words_due -= Counter([output.request_id])
            elif (stream := self._streams.get(output.request_id)) is not None and not stream.ended:
                self._hand_over(output, stream)

    def _hand_over(self, output: RequestStarted | RequestOutput, stream: OutputStream) -> None:
        failed = stream.failed
        stream.put(output)
        if stream.failed and not failed and not stream.ended:
            log.warning("%s: cancelled, as its client does not read", output.request_id)
            self.host.send(AbortRequest(output.request_id))

    def _die(self, death: EngineDied) -> None:
        if self.death is None:
            self.death = death
            self.died.set()
            for stream in self._streams.values():
                stream.ended = True
                stream.fail(self._death_error(death))
            self._fail_replies(self._death_error(death))

    @staticmethod
    def _death_error(death: EngineDied) -> Internal:
        return Internal("ENGINE_DIED", f"the engine has died and this replica must restart: {death.error}")
