"""An engine without a model: it speaks the engine's messages and says the same tokens to everyone, a token a step."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Sequence

from services.inference.config import ServerConfig
from services.inference.engine.messages import (
    AbortRequest,
    AddRequest,
    EngineInput,
    EngineOutput,
    RequestFinished,
    RequestOutput,
    RequestStarted,
    RequestTimes,
    Shutdown,
)
from services.inference.hosting.interface import Deliver
from services.inference.model.config import ModelConfig


class StubEngine:
    """Generates for whoever asks, until `max_tokens`; answers nothing else.

    token_ids: what it says, over and over; step_seconds: how long a step takes at least
    """

    def __init__(self, inbox: queue.SimpleQueue[EngineInput], token_ids: Sequence[int], step_seconds: float) -> None:
        self.inbox = inbox
        self.emit: Deliver = lambda _outputs: None
        self._token_ids = token_ids
        self._step_seconds = step_seconds
        self._left: dict[str, int] = {}
        self._outputs: list[EngineOutput] = []
        self._shutdown: Shutdown | None = None

    def run(self) -> None:
        due = time.monotonic()
        for token_id in itertools.cycle(self._token_ids):
            self._receive()
            if self._shutdown is not None and not (self._shutdown.drain and self._left):
                break
            self._step(token_id)
            due = max(due + self._step_seconds, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
        for request_id in list(self._left):
            self._end(request_id)
        self._tell()

    def _receive(self) -> None:
        """Take in what has come; sleep where there is nothing else to do."""
        while not self.inbox.empty() or not (self._left or self._shutdown):
            match self.inbox.get():
                case AddRequest(request_id=request_id) as add:
                    self._left[request_id] = add.stopping.max_tokens
                    self._outputs.append(RequestStarted(request_id, "", 0))
                    self._outputs.append(RequestOutput(request_id, times=RequestTimes()))
                case AbortRequest(request_id) if request_id in self._left:
                    self._end(request_id)
                case Shutdown() as shutdown:
                    self._shutdown = shutdown

    def _step(self, token_id: int) -> None:
        for request_id, left in list(self._left.items()):
            finished = RequestFinished("LENGTH") if left == 1 else None
            self._outputs.append(RequestOutput(request_id, (token_id,), finished=finished))
            self._left[request_id] = left - 1
            if left == 1:
                del self._left[request_id]
        self._tell()

    def _end(self, request_id: str) -> None:
        del self._left[request_id]
        self._outputs.append(RequestOutput(request_id, finished=RequestFinished("CANCELLED")))

    def _tell(self) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs:
            self.emit(outputs)


def stub_engine(
    token_ids: Sequence[int],
    step_seconds: float,
    _config: ServerConfig,
    _model: ModelConfig,
    inbox: queue.SimpleQueue[EngineInput],
) -> StubEngine:
    return StubEngine(inbox, token_ids, step_seconds)
