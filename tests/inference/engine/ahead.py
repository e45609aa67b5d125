"""A runner that runs ahead as a GPU's does, around one that does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from services.inference.engine.interfaces import LaunchedStep, Runner, SampledToken, ScheduledRequest
from services.inference.engine.request import PENDING, Request


def never(_request: Request, _token: int = 0) -> bool:
    return False


class RunningAhead:
    """Computes each step as it is launched, which is the order a device keeps, and tells its tokens when it is read.

    is_left_to_host: whether a request's token is the host's to choose, so that its step waits to be read
    is_late: whether a request's token turns out to be another one than the next step went on from
    log: what was launched and read, by number
    """

    def __init__(
        self,
        runner: Runner,
        is_left_to_host: Callable[[Request], bool] = never,
        is_late: Callable[[Request, int], bool] = never,
    ) -> None:
        self._runner = runner
        self._is_left_to_host = is_left_to_host
        self._is_late = is_late
        self._on_device: dict[Request, int] = {}
        self._launched = 0
        self._read = 0
        self.log: list[tuple[str, int]] = []

    def launch(self, step: Sequence[ScheduledRequest]) -> LaunchedStep:
        assert self._launched - self._read <= 1, "two steps are unread"
        self.log.append(("launch", self._launched))
        runs_ahead = not any(each.samples and self._is_left_to_host(each.request) for each in step)
        tokens = self._compute(step)
        if not runs_ahead:
            self._on_device = {}
        self._launched += 1
        return _Ahead(self, self._launched - 1, tokens, runs_ahead)

    def _compute(self, step: Sequence[ScheduledRequest]) -> list[SampledToken | None]:
        pending = [each.request for each in step if each.request.token_ids[-1] == PENDING]
        for request in pending:
            request.token_ids[-1] = self._on_device[request]
        tokens = self._runner.launch(step).read()
        for request in pending:
            request.token_ids[-1] = PENDING
        self._on_device = {}
        for index, (each, token) in enumerate(zip(step, tokens, strict=True)):
            if token is not None:
                late = token.error is None and self._is_late(each.request, token.token_id)
                self._on_device[each.request] = token.token_id ^ late
                tokens[index] = replace(token, late=late)
        return tokens

    def read(self, number: int) -> None:
        assert number == self._read, "read out of order"
        self.log.append(("read", number))
        self._read += 1


@dataclass(frozen=True)
class _Ahead:
    runner: RunningAhead
    number: int
    tokens: list[SampledToken | None]
    runs_ahead: bool

    def read(self) -> list[SampledToken | None]:
        self.runner.read(self.number)
        return self.tokens
