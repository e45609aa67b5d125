"""An engine in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from services.inference.engine.messages import EngineInput, EngineOutput, Shutdown
from services.inference.hosting.interface import Deliver, MessageLoop


class ThreadHost:
    """Runs `engine`, which is built already, beside the running event loop."""

    def __init__(self, engine: MessageLoop) -> None:
        self.engine = engine
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=engine.run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    async def ready(self) -> None:
        """It is."""

    def connect(self, deliver: Deliver) -> None:
        def emit(outputs: Sequence[EngineOutput]) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(deliver, outputs)

        self.engine.emit = emit
        self._thread.start()

    def send(self, message: EngineInput) -> None:
        self.engine.inbox.put(message)

    async def wait_ended(self, timeout: float) -> bool:
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, timeout)
        return not self._thread.is_alive()

    async def close(self) -> None:
        self.send(Shutdown(drain=False))
