"""What the kernels are held to, beside what a run found. Pure: lines of results in, a table out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_DECODE_ROWS = 256
MANY_RANKS = 512

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Gate:
    """seen: the worst of the cases it is about, None where there were none; at_least: else at most."""

    name: str
    gate: float
    aim: float
    seen: float | None
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.seen is None:
            return "not measured"
        reached = [self.seen >= goal if self.at_least else self.seen <= goal for goal in (self.gate, self.aim)]
        return "aim" if reached[1] else "gate" if reached[0] else "MISSED"


def gates(results: Sequence[Result], bandwidth: float) -> list[Gate]:
    """bandwidth: bytes a second of a copy"""
    ratios = {peer: list(_against(results, peer)) for peer in ("vllm", "sglang")}
    return [
        Gate("one r=16 adapter, extra a layer, us", 15, 3, max(_one_adapter(results), default=None)),
        Gate(
            f"sum of ranks >= {MANY_RANKS}, share of copy bandwidth",
            0.60,
            0.70,
            min(_bandwidth_shares(results, bandwidth), default=None),
            at_least=True,
        ),
        Gate("mixed ranks over byte-proportional", 1.25, 1.15, max(_mixed(results), default=None)),
        *(
            Gate(f"cases faster than {peer}", 0.90, 1.0, _share_below(each, 1.0), at_least=True)
            for peer, each in ratios.items()
        ),
        *(Gate(f"ours over {peer}, slowest case", 1.10, 1.0, max(each, default=None)) for peer, each in ratios.items()),
        Gate(
            "host work a step, us", 100, 50, max((each["metrics"]["ours"]["host_us"] for each in results), default=None)
        ),
    ]


def engine_gates(results: Sequence[Result]) -> list[Gate]:
    """Of the engine's own lines, whose ratios are of one run each (`services.bench.engine.gpu`)."""

    def of(metric: str, **setup: object) -> list[float]:
        kept = [each for each in results if setup.items() <= each["setup"].items() and metric in each["metrics"]]
        return [each["metrics"][metric] for each in kept]

    def share(name: str, gate: float, aim: float, **setup: object) -> Gate:
        return Gate(name, gate, aim, min(of("of_base", rank=16, **setup), default=None), at_least=True)

    steps, floors = (of(metric, case="decode", adapters=0) for metric in ("seconds", "weights_floor_seconds"))
    base = [step / floor for step, floor in zip(steps, floors, strict=True)]
    loads = (1e3 * each for each in of("seconds", case="load", rank=16))
    return [
        share("decode, one r=16 adapter, share of base", 0.88, 0.97, case="decode", adapters=1),
        share("decode, batch 64, 16 adapters", 0.83, 0.92, case="decode", batch=64, adapters=16),
        share("decode, batch 64, 64 adapters", 0.68, 0.77, case="decode", batch=64, adapters=64),
        share("prefill, one r=16 adapter", 0.90, 0.95, case="prefill", adapters=1),
        Gate("base decode over reading the weights", 1.25, 1.15, max(base, default=None)),
        Gate("a load of r=16, ms", 2.2, 1.8, max(loads, default=None)),
        Gate("p99 of steps beside loads, over without", 1.05, 1.02, max(of("p99_of_quiet"), default=None)),
    ]


def table(found: Sequence[Gate]) -> str:
    rows = [("", "seen", "gate", "aim", "")]
    for each in found:
        seen = "" if each.seen is None else f"{each.seen:.3g}"
        rows.append((each.name, seen, f"{each.gate:g}", f"{each.aim:g}", each.verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _one_adapter(results: Iterable[Result]) -> Iterable[float]:
    for each in results:
        setup = each["setup"]
        if setup["adapters"] == 1 and setup["ranks"] == [16] and not setup["segments"]:
            yield each["metrics"]["ours"]["extra_us"]


def _bandwidth_shares(results: Iterable[Result], bandwidth: float) -> Iterable[float]:
    """Of LoRA alone, where a second-level cache cannot hold the layers' adapters."""
    for each in results:
        setup = each["setup"]
        if setup["sum_of_ranks"] >= MANY_RANKS and not setup["segments"]:
            yield setup["adapter_bytes"] / (1e-6 * each["metrics"]["ours"]["alone_us"][1]) / bandwidth


def _mixed(results: Sequence[Result]) -> Iterable[float]:
    """Extra a byte of mixed ranks, over extra a byte of the largest of them alone, in the same batch."""

    def per_byte(each: Result) -> float:
        return float(each["metrics"]["ours"]["extra_us"] / each["setup"]["adapter_bytes"])

    def batch(each: Result) -> tuple[object, ...]:
        setup = each["setup"]
        return setup["rows"], setup["adapters"], setup["popularity"], setup["segments"]

    largest = {batch(each): per_byte(each) for each in results if each["setup"]["ranks"] == [64]}
    for each in results:
        if len(each["setup"]["ranks"]) > 1 and largest.get(batch(each), 0) > 0:
            yield per_byte(each) / largest[batch(each)]


def _against(results: Iterable[Result], peer: str) -> Iterable[float]:
    for each in results:
        if peer in each["metrics"]:
            yield each["metrics"]["ours"]["alone_us"][1] / each["metrics"][peer]["alone_us"][1]


def _share_below(ratios: Sequence[float], limit: float) -> float | None:
    return sum(ratio < limit for ratio in ratios) / len(ratios) if ratios else None
