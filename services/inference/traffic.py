"""What requests brought, by adapter: tokens, times, tiers; apart for the busiest adapters, in one for the rest.

Summed where answers go out, so that the engine's thread has nothing to do for it; a request's queue time, time to first
token and adapter load are the engine's own measures, which come with its first token.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.inference.engine.messages import RequestTimes

TIME_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Seconds; upper ends of the buckets, but for the last, which has none."""
MAX_COUNTED = 10_000
"""Adapters whose requests are counted, to know who is busiest; when there are more, all counts are halved."""


class Histogram:
    """Counts of seconds by bucket of TIME_BOUNDS, and their sum."""

    def __init__(self) -> None:
        self._counts = [0] * (len(TIME_BOUNDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self._counts[bisect_left(TIME_BOUNDS, seconds)] += times
        self.sum += seconds * times

    def absorb(self, other: Histogram) -> None:
        self._counts = [mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)]
        self.sum += other.sum

    def buckets(self) -> Sequence[tuple[str, int]]:
        """Upper ends and how many observations do not exceed them, as Prometheus has it."""
        ends = [*map(str, TIME_BOUNDS), "+Inf"]
        return list(zip(ends, itertools.accumulate(self._counts), strict=True))


@dataclass(slots=True)
class Record:
    """One request's traffic, or many requests'.

    requests: by the tier their adapter came from; '' for the base model
    failures: of requests that were admitted, by status code
    """

    requests: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    queue: Histogram = field(default_factory=Histogram)
    ttft: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)
    adapter_load: Histogram = field(default_factory=Histogram)

    def absorb(self, other: Record) -> None:
        self.requests.update(other.requests)
        self.failures.update(other.failures)
        self.prompt_tokens += other.prompt_tokens
        self.generation_tokens += other.generation_tokens
        self.queue.absorb(other.queue)
        self.ttft.absorb(other.ttft)
        self.inter_token.absorb(other.inter_token)
        self.adapter_load.absorb(other.adapter_load)


class Meter:
    """Measures one request as its outputs come. Tokens that come together count as come evenly since the last."""

    def __init__(self) -> None:
        self.record = Record()
        self._last: float | None = None

    def started(self, tier: str, prompt_tokens: int) -> None:
        self.record.requests[tier] += 1
        self.record.prompt_tokens += prompt_tokens

    def failed(self, code: str) -> None:
        self.record.failures[code] += 1

    def tokens(self, count: int, times: RequestTimes | None) -> None:
        """`times` comes with the first of a request's tokens."""
        now = time.monotonic()
        self.record.generation_tokens += count
        if times is not None:
            self.record.queue.observe(times.queue)
            self.record.ttft.observe(times.ttft)
            if times.adapter_load:
                self.record.adapter_load.observe(times.adapter_load)
        if self._last is not None and count:
            self.record.inter_token.observe((now - self._last) / count, count)
        self._last = now


class Traffic:
    """Keeps `top` records by name, and one for the rest.

    A name that overtakes the least busy one takes its place, from zero; what the other had goes to the rest. So no
    series ever falls but by ending, and the rest's never does.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._counts: Counter[str] = Counter()
        self._shown: dict[str, Record] = {}
        self.rest = Record()

    @property
    def shown(self) -> Mapping[str, Record]:
        return self._shown

    def add(self, name: str, record: Record) -> None:
        """Take in what a request that has ended brought."""
        self._counts[name] += 1
        if len(self._counts) > MAX_COUNTED:
            self._counts = Counter({each: count // 2 for each, count in self._counts.items() if count > 1})
        if name not in self._shown and self._has_place(name):
            self._shown[name] = Record()
        self._shown.get(name, self.rest).absorb(record)

    def _has_place(self, name: str) -> bool:
        if len(self._shown) < self._top:
            return True
        least = min(self._shown, key=lambda each: self._counts[each], default=name)
        if self._counts[name] <= self._counts[least]:
            return False
        self.rest.absorb(self._shown.pop(least))
        return True
