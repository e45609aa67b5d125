"""The requests of a run, decided before the first is sent: equal settings and seed give equal requests."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from services.bench.load.popularity import Popularity
from services.common.errors import InvalidArgument

FIRST_ID = 10
"""Prompts are made of ids from here on: below are the special tokens of common vocabularies."""


class Backend(StrEnum):
    """GRPC: InferenceService.Generate; OPENAI: POST /v1/completions of any server that has it."""

    GRPC = "grpc"
    OPENAI = "openai"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of a server; names and meanings as in `vllm bench serve`, where it has them.

    request_rate: requests a second; inf sends each as soon as max_concurrency allows
    burstiness: shape of the Gamma distribution between arrivals, 1 ÷ cv²; 1 is a Poisson process
    max_concurrency: most requests in flight; None: no bound
    random_range_ratio: lengths are uniform within (1 ± this) times the given ones
    vocab_size: prompts are token ids below this
    num_warmups: requests of the same kind sent before, and not counted
    """

    num_prompts: int = 100
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    random_input_len: int = 64
    random_output_len: int = 64
    random_range_ratio: float = 0.0
    vocab_size: int = 1000
    ignore_eos: bool = True
    num_warmups: int = 0
    seed: int = 0
    popularity: Popularity = field(default_factory=Popularity)

    def __post_init__(self) -> None:
        _check("--num-prompts", self.num_prompts, self.num_prompts >= 1, "at least 1")
        _check("--request-rate", self.request_rate, self.request_rate > 0, "above 0; inf sends all at once")
        _check("--burstiness", self.burstiness, 0 < self.burstiness < math.inf, "above 0")
        if self.max_concurrency is not None:
            _check("--max-concurrency", self.max_concurrency, self.max_concurrency >= 1, "at least 1")
        _check("--random-input-len", self.random_input_len, self.random_input_len >= 1, "at least 1")
        _check("--random-output-len", self.random_output_len, self.random_output_len >= 1, "at least 1")
        _check("--random-range-ratio", self.random_range_ratio, 0 <= self.random_range_ratio < 1, "in [0, 1)")
        _check("--vocab-size", self.vocab_size, self.vocab_size > FIRST_ID, f"above {FIRST_ID}")
        _check("--num-warmups", self.num_warmups, self.num_warmups >= 0, "0 or more")


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: due seconds after the start; an empty adapter is the base model."""

    adapter: str
    prompt: Sequence[int]
    max_tokens: int
    due: float
    ignore_eos: bool = True


def plan(load: Load, adapters: Sequence[str]) -> list[Planned]:
    """Every request of the run, in order of arrival; without adapters, of the base model.

    Each aspect has a generator of its own: another rate asks the same questions of the same adapters.
    """
    names = adapters or [""]
    chosen = load.popularity.draw(len(names), load.num_prompts, _rng(load, "popularity"))
    due = arrivals(load.num_prompts, load.request_rate, load.burstiness, _rng(load, "arrivals"))
    lengths, ids = _rng(load, "lengths"), _rng(load, "ids")
    requests = []
    for number, moment in zip(chosen, due, strict=True):
        num_input = _length(load.random_input_len, load.random_range_ratio, lengths)
        num_output = _length(load.random_output_len, load.random_range_ratio, lengths)
        prompt = ids.choices(range(FIRST_ID, load.vocab_size), k=num_input)
        requests.append(Planned(names[number], prompt, num_output, moment, load.ignore_eos))
    return requests


def endless(load: Load, adapters: Sequence[str]) -> Iterator[Planned]:
    """The load's requests, then those of the next seed, and so on; none is due at a time."""
    for seed in itertools.count(load.seed):
        yield from plan(replace(load, seed=seed, request_rate=math.inf), adapters)


def arrivals(requests: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds after the start at which each is due, the first at 0: Gamma intervals of mean 1 ÷ rate and
    cv = burstiness^-½; all 0 at an infinite rate."""
    if math.isinf(rate):
        return [0.0] * requests
    due = [0.0]
    for _ in range(requests - 1):
        due.append(due[-1] + rng.gammavariate(burstiness, 1 / (rate * burstiness)))
    return due


def _length(mean: int, ratio: float, rng: random.Random) -> int:
    return rng.randint(max(1, math.floor(mean * (1 - ratio))), math.ceil(mean * (1 + ratio)))


def _rng(load: Load, aspect: str) -> random.Random:
    return random.Random(f"{load.seed} {aspect}")


def _check(flag: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise InvalidArgument("INVALID_FIELD", f"{flag} is {value:g}; it must be {allowed}", field=flag)
