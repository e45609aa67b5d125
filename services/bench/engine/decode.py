"""Decode steps beside reading what they must read. Bandwidth moves by the minute on a shared machine, so whatever is
compared is measured within one round, one after the other, and it is the rounds' ratios whose median is taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.bench.engine.bandwidth import ReadBandwidth
from services.bench.engine.steps import Bare
from services.bench.progress import says
from services.bench.results import Figure, Result, quartiles, spread

CONTEXT = 128
WARM_STEPS = 1
OVER_FLOOR, ETA, DISTINCT = 1.3, 0.6, 1.5
_LEAST_EXTRA = 0.1
"""Of its floor: adapters that seem to add less, or nothing, were lost in the noise, and η says no more than 10."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """steps: of a run, whose median counts; rounds: of everything that is compared, in turn; batches: of decode"""

    steps: int = 4
    rounds: int = 15
    batches: Sequence[int] = (1, 8, 16)
    distinct: Sequence[int] = (1, 2, 4, 8, 16)
    ranks: Sequence[int] = (8, 16, 64)

    def mixes(self) -> dict[int, list[int]]:
        """Distinct adapters by batch, 0 for the base: as many as rows, and every number at the largest batch."""
        largest = max(self.batches)
        found = {batch: [0, batch] for batch in self.batches}
        return found | {largest: [0, *(count for count in self.distinct if count <= largest)]}


@dataclass(frozen=True, slots=True)
class Round:
    """rate: bytes a second, the median of the passes between steps; steps: seconds of one, by distinct adapters"""

    rate: float
    steps: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Decode:
    """All rounds of a rank, by batch.

    weight_bytes: of the model in its dtype, what targets are about; packed_bytes: as they lie in memory, perhaps fewer
    adapter_bytes: of one adapter
    """

    rounds: Mapping[int, Sequence[Round]]
    weight_bytes: int
    packed_bytes: int
    adapter_bytes: int

    def over_weights(self, batch: int) -> list[float]:
        """A step of the base ÷ reading the weights in the model's dtype."""
        return [each.steps[0] * each.rate / self.weight_bytes for each in self.rounds[batch]]

    def over_adapters(self, batch: int, distinct: int) -> list[float]:
        """What adapters add to a step ÷ reading them: 1 ÷ η."""
        floor = distinct * self.adapter_bytes
        return [(each.steps[distinct] - each.steps[0]) * each.rate / floor for each in self.rounds[batch]]

    def over_one(self, batch: int) -> list[float]:
        """A step of as many adapters as rows ÷ one of a single adapter."""
        return [each.steps[batch] / each.steps[1] for each in self.rounds[batch]]


def decode(bare: Bare, bandwidth: ReadBandwidth, sizes: Sizes, setup: dict[str, Any]) -> Iterator[Result]:
    """A result a rank of adapters."""
    for rank in sizes.ranks:
        adapter_bytes = bare.load_adapters(max(sizes.batches), rank)
        with says(f"decode, rank {rank}"):
            rounds: dict[int, list[Round]] = {batch: [] for batch in sizes.batches}
            for _ in range(sizes.rounds):
                for batch, mixes in sizes.mixes().items():
                    rounds[batch].append(_round(bare, bandwidth, batch, mixes, sizes.steps))
        yield _result(Decode(rounds, bare.dtype_bytes, bare.weight_bytes, adapter_bytes), rank, setup)


def _round(bare: Bare, bandwidth: ReadBandwidth, batch: int, mixes: Sequence[int], steps: int) -> Round:
    rates, taken = [bandwidth.measure()], {}
    for distinct in mixes:
        taken[distinct] = decode_seconds(bare, batch, distinct, steps)
        rates.append(bandwidth.measure())
    return Round(statistics.median(rates), taken)


def decode_seconds(bare: Bare, batch: int, distinct: int, steps: int) -> float:
    """The median of the steps after the first. The cache holds zeros, which take as long as any values."""
    sequences = bare.sequences(batch, distinct, CONTEXT, computed=CONTEXT - 1)
    times = [bare.step(sequences) for _ in range(WARM_STEPS + steps)]
    return statistics.median(times[WARM_STEPS:])


def _result(found: Decode, rank: int, setup: dict[str, Any]) -> Result:
    figures, over_weights, over_adapters = [], {}, {}
    for batch, rounds in found.rounds.items():
        over_weights[f"{batch}"] = ratio = quartiles(found.over_weights(batch))
        target = OVER_FLOOR if batch == 1 else None
        name = f"decode, batch {batch}: step ÷ reading the weights in {setup['dtype']}"
        as_they_lie = ratio["median"] * found.weight_bytes / found.packed_bytes
        note = f"{ratio['q1']:g} to {ratio['q3']:g}; as they lie {as_they_lie:.3g}"
        note += f"; {_milliseconds(rounds, 0)}, {_rate(rounds)}"
        figures.append(Figure(name, ratio["median"], " ×", target, True, note))
        for distinct in filter(None, rounds[0].steps):
            over_adapters[f"{batch}x{distinct}"] = ratio = quartiles(found.over_adapters(batch, distinct))
            eta = {quartile: 1 / max(value, _LEAST_EXTRA) for quartile, value in ratio.items()}
            target = ETA if batch == distinct == 8 and rank == 16 else None
            name = f"decode, rank {rank}, batch {batch}, {distinct} adapters: η"
            note = f"{eta['q3']:.2g} to {eta['q1']:.2g}; {_milliseconds(rounds, distinct)}"
            figures.append(Figure(name, eta["median"], "", target, note=note))
    largest = max(found.rounds)
    over_one = quartiles(found.over_one(largest))
    name = f"decode, rank {rank}, batch {largest}: {largest} adapters ÷ 1"
    target, note = DISTINCT if rank == 16 else None, f"{over_one['q1']:g} to {over_one['q3']:g}"
    figures.append(Figure(name, over_one["median"], " ×", target, True, note))
    every = [each for rounds in found.rounds.values() for each in rounds]
    metrics = {
        "read_gb_per_s": spread([each.rate / 1e9 for each in every]),
        "weight_bytes": found.weight_bytes,
        "packed_bytes": found.packed_bytes,
        "adapter_bytes": found.adapter_bytes,
        "step_over_weights": over_weights,
        "extra_over_adapters": over_adapters,
        "most_over_one_adapter": over_one,
        "step_ms": {
            f"{batch}x{distinct}": spread([each.steps[distinct] * 1e3 for each in rounds])
            for batch, rounds in found.rounds.items()
            for distinct in rounds[0].steps
        },
    }
    return Result("engine_decode", setup | {"rank": rank, "context": CONTEXT}, metrics, figures)


def _milliseconds(rounds: Sequence[Round], distinct: int) -> str:
    found = spread([each.steps[distinct] * 1e3 for each in rounds])
    return f"{found['median']:g} ms of {found['low']:g} to {found['high']:g}"


def _rate(rounds: Sequence[Round]) -> str:
    found = spread([each.rate / 1e9 for each in rounds])
    return f"{found['median']:g} GB/s of {found['low']:g} to {found['high']:g}"
