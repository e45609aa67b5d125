"""An engine in a process of its own, so that the face's work and the engine's do not wait for one interpreter lock."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from services.common.errors import Internal
from services.inference.engine.messages import EngineDied, EngineInput, EngineOutput, Shutdown
from services.inference.hosting.interface import Deliver, EngineBuilder
from services.inference.hosting.wire import Decoder, Start, Started, encode

CLOSE_SECONDS = 5.0
"""How long a process whose socket was closed may take to end before it is killed."""


class ProcessHost(asyncio.Protocol):
    """Starts the process at once; `ready` waits until the engine is built there.

    The event loop itself reads the socket: a step's outputs are one frame, and cost one wake-up.
    """

    def __init__(self, build: EngineBuilder) -> None:
        self._ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.inference.hosting.child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__,
                process_group=0,  # the terminal's SIGINT is for the face
            )
        self._first = encode(Start(build, logging.getLogger().getEffectiveLevel()))
        self._decoder = Decoder()
        self._deliver: Deliver | None = None
        self._transport: asyncio.Transport | None = None
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()
        self._told_to_end = False
        self._watching: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Raises what building the engine raised, and Internal when its process ended meanwhile."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=self._ours)
        await self._started

    @property
    def is_alive(self) -> bool:
        return not self._ended.is_set()

    def connect(self, deliver: Deliver) -> None:
        self._deliver = deliver

    def send(self, message: EngineInput) -> None:
        assert self._transport is not None, "nothing is sent before the engine is ready"
        self._told_to_end = self._told_to_end or isinstance(message, Shutdown)
        self._transport.write(encode(message))

    async def wait_ended(self, timeout: float) -> bool:
        try:
            await asyncio.wait_for(self._ended.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        self._deliver = None
        if self._transport is not None:
            self._transport.abort()
        else:
            self._ours.close()
        try:
            await asyncio.to_thread(self.process.wait, CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        if self._watching is not None:
            await self._watching

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._first)

    def data_received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            if isinstance(message, Started):
                if message.error is None:
                    self._started.set_result(None)
                else:
                    self._started.set_exception(message.error)
            else:
                self._tell(message)

    def connection_lost(self, _error: Exception | None) -> None:
        self._watching = asyncio.create_task(self._take_leave())

    async def _take_leave(self) -> None:
        """The socket is closed, so the process has ended or is about to; what that means depends on how."""
        code = await asyncio.to_thread(self.process.wait)
        self._ended.set()
        if not self._started.done():
            self._started.set_exception(Internal("ENGINE_DIED", f"while it started, {_fate(code)}"))
        elif not self._told_to_end or code:
            self._tell([EngineDied(_fate(code))])

    def _tell(self, outputs: Sequence[EngineOutput]) -> None:
        if self._deliver is not None:
            self._deliver(outputs)


def _fate(code: int) -> str:
    if code < 0:
        return f"the engine's process was killed by {signal.Signals(-code).name}"
    return f"the engine's process ended with code {code}"
