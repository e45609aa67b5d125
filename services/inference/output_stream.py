"""One request's outputs between the engine's deliveries and their reader: bounded, and merged while they wait."""

from __future__ import annotations

import asyncio

from services.common.errors import MultiloraError, ResourceExhausted
from services.inference.engine.messages import RequestOutput, RequestStarted


class OutputStream:
    """Filled and read in the event loop.

    ended: whether the engine will say nothing more about the request
    failed: whether what it says is not kept any more
    """

    def __init__(self, max_unread_tokens: int) -> None:
        self._max_unread_tokens = max_unread_tokens
        self._unread: list[RequestStarted | RequestOutput] = []
        self._unread_tokens = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: MultiloraError | None = None
        self.ended = False

    @property
    def failed(self) -> bool:
        return self._error is not None

    def put(self, output: RequestStarted | RequestOutput) -> None:
        """Take what the engine said. More unread tokens than may be make the stream fail with CLIENT_TOO_SLOW."""
        if isinstance(output, RequestOutput):
            self._unread_tokens += len(output.token_ids)
            self.ended = output.finished is not None
        if self._error is None:
            self._unread.append(output)
            if self._unread_tokens > self._max_unread_tokens and not self.ended:
                self._unread.clear()
                message = f"the client left more than {self._max_unread_tokens} tokens unread; read on, or ask for less"
                self.fail(ResourceExhausted("CLIENT_TOO_SLOW", message))
            self._wake()

    def fail(self, error: MultiloraError) -> None:
        """End with `error`, after what is unread."""
        self._error = error
        self._wake()

    async def take(self) -> list[RequestStarted | RequestOutput]:
        """What has come since the last time, the outputs as one; waits for the first. Raises what it failed with."""
        if not self._unread and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if not self._unread:
            assert self._error is not None
            raise self._error
        taken, self._unread, self._unread_tokens = self._unread, [], 0
        return taken if len(taken) == 1 else _merged(taken)

    def _wake(self) -> None:
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None


def _merged(taken: list[RequestStarted | RequestOutput]) -> list[RequestStarted | RequestOutput]:
    started = [each for each in taken if isinstance(each, RequestStarted)]
    outputs = [each for each in taken if isinstance(each, RequestOutput)]
    if len(outputs) > 1:
        whole = RequestOutput(
            outputs[0].request_id,
            tuple(token for output in outputs for token in output.token_ids),
            tuple(position for output in outputs for position in output.logprobs),
            next((output.times for output in outputs if output.times is not None), None),
            outputs[-1].finished,
        )
        return [*started, whole]
    return [*started, *outputs]
