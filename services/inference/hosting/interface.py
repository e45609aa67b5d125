"""Where an engine runs, as the serving face sees it: messages go in, each step's outputs come back."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Protocol

from services.inference.engine.messages import EngineInput, EngineOutput

Deliver = Callable[[Sequence[EngineOutput]], None]


class MessageLoop(Protocol):
    """What takes messages from `inbox` and emits outputs, one batch a step, until it is told to shut down."""

    inbox: queue.SimpleQueue[EngineInput]
    emit: Deliver

    def run(self) -> None: ...


EngineBuilder = Callable[[queue.SimpleQueue[EngineInput]], MessageLoop]
"""Makes an engine around its inbox; picklable, where another process is to call it."""


class EngineHost(Protocol):
    """A running engine. Everything here is called from the event loop."""

    @property
    def is_alive(self) -> bool: ...

    async def ready(self) -> None:
        """Return once the engine is built. Raises what building it raised."""

    def connect(self, deliver: Deliver) -> None:
        """Have outputs delivered, in the event loop; called once, before the first message is sent."""

    def send(self, message: EngineInput) -> None:
        """Hand over a message; never waits. What an engine that has ended is sent is lost."""

    async def wait_ended(self, timeout: float) -> bool:
        """Whether the engine has ended, or does within `timeout` seconds; all it had to say is delivered then."""

    async def close(self) -> None:
        """End the engine, if it has not ended by itself."""
