"""What a tenant may use: requests a second and at once, tokens a minute; in the store, adapters and bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.common.errors import ResourceExhausted

BURST_SECONDS = 1.0
"""So many seconds' requests may come at once."""
CONCURRENCY_RETRY_SECONDS = 1.0

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Limits:
    """One tenant's, on each process that serves it; 0 is no limit.

    tokens_per_minute: of prompts and answers together
    max_adapters, max_bytes: in the store; bytes are those of packed versions, until they are collected
    """

    requests_per_second: float = 0.0
    concurrency: int = 0
    tokens_per_minute: float = 0.0
    max_adapters: int = 0
    max_bytes: int = 0


class Bucket:
    """Fills at a rate, up to its capacity; may be drawn below zero, and then says how long until it is not."""

    def __init__(self, rate: float, capacity: float, clock: Clock = time.monotonic) -> None:
        self.rate = rate
        self.capacity = capacity
        self._clock = clock
        self._level, self._at = capacity, clock()

    def draw(self, amount: float = 1.0) -> None:
        self._fill()
        self._level -= amount

    def wait(self) -> float:
        """Seconds until there is one; 0 when there is."""
        self._fill()
        return max(0.0, (1.0 - self._level) / self.rate)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._at) * self.rate)
        self._at = now


class Budget:
    """What is left of one tenant's limits in this process."""

    def __init__(self, tenant: str, limits: Limits, clock: Clock = time.monotonic) -> None:
        self.tenant = tenant
        self.limits = limits
        self._running = 0
        rate, minute = limits.requests_per_second, limits.tokens_per_minute
        self._requests = Bucket(rate, max(1.0, rate * BURST_SECONDS), clock) if rate else None
        self._tokens = Bucket(minute / 60, minute, clock) if minute else None

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A call of the tenant. Raises ResourceExhausted with the seconds after which it would be taken."""
        if self._requests is not None and (seconds := self._requests.wait()):
            raise self._refusal("REQUEST_RATE", f"{self.limits.requests_per_second:g} requests a second", seconds)
        if self._tokens is not None and (seconds := self._tokens.wait()):
            raise self._refusal("TOKEN_RATE", f"{self.limits.tokens_per_minute:g} tokens a minute", seconds)
        if self.limits.concurrency and self._running >= self.limits.concurrency:
            raise self._refusal("CONCURRENCY", f"{self.limits.concurrency} requests at once", CONCURRENCY_RETRY_SECONDS)
        if self._requests is not None:
            self._requests.draw()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def spend(self, tokens: int) -> None:
        """Tokens of a request that was taken: they may go beyond the limit, and later requests wait for that."""
        if self._tokens is not None:
            self._tokens.draw(tokens)

    def _refusal(self, what: str, limit: str, seconds: float) -> ResourceExhausted:
        return ResourceExhausted(
            f"TENANT_{what}_LIMIT",
            f"tenant {self.tenant} is limited to {limit}; send fewer, or have the limit raised",
            retry_after=seconds,
            tenant=self.tenant,
        )
