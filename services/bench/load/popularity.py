"""Which adapter each request asks for: the mixes that papers and other benchmarks of many adapters use."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from enum import StrEnum

from services.common.errors import InvalidArgument


class Mix(StrEnum):
    """How requests spread over N adapters, the first of which is the most popular where they differ.

    UNIFORM     each request draws any adapter
    DISTINCT    one after the other, so that as many as possible are in flight at once
    IDENTICAL   all ask for the first
    ZIPF        adapter k, from 1, in proportion to k^-s
    POWER       S-LoRA's traces: adapter ⌊N·x⌋ where x has the density α·x^(α-1) on [0, 1)
    SKEWED      the first takes a share p, the others share the rest evenly
    """

    UNIFORM = "uniform"
    DISTINCT = "distinct"
    IDENTICAL = "identical"
    ZIPF = "zipf"
    POWER = "power"
    SKEWED = "skewed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Popularity:
    """A mix with its parameters; each is read by the mix of its name alone."""

    mix: Mix = Mix.UNIFORM
    zipf_s: float = 1.0
    power_alpha: float = 0.5
    skew_share: float = 0.9

    def __post_init__(self) -> None:
        _check("--zipf-s", self.zipf_s, self.zipf_s >= 0, "0 or more")
        _check("--power-alpha", self.power_alpha, self.power_alpha > 0, "above 0")
        _check("--skew-share", self.skew_share, 0 <= self.skew_share <= 1, "from 0 to 1")

    def shares(self, adapters: int) -> list[float]:
        """What part of the requests asks for each adapter; they sum to 1."""
        match self.mix:
            case Mix.UNIFORM | Mix.DISTINCT:
                shares = [1.0] * adapters
            case Mix.IDENTICAL:
                shares = [1.0] + [0.0] * (adapters - 1)
            case Mix.ZIPF:
                shares = [rank**-self.zipf_s for rank in range(1, adapters + 1)]
            case Mix.POWER:
                reached = [(number / adapters) ** self.power_alpha for number in range(adapters + 1)]
                shares = [high - low for low, high in itertools.pairwise(reached)]
            case Mix.SKEWED:
                rest = (1 - self.skew_share) / max(adapters - 1, 1)
                shares = [self.skew_share if adapters > 1 else 1.0] + [rest] * (adapters - 1)
        total = math.fsum(shares)
        return [share / total for share in shares]

    def draw(self, adapters: int, requests: int, rng: random.Random) -> list[int]:
        """The number of an adapter, below `adapters`, for each request."""
        if self.mix is Mix.DISTINCT:
            return [number % adapters for number in range(requests)]
        return rng.choices(range(adapters), weights=self.shares(adapters), k=requests)


def _check(flag: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise InvalidArgument("INVALID_FIELD", f"{flag} is {value:g}; it must be {allowed}", field=flag)
