"""The adapter store's benchmark: `python -m services.bench.store [--quick] [--out FILE]`, or `make bench-store`.

What counts are ratios to bare programs that run beside the store, A, B, A, B …, in one run; the rest has the machine's
own floor beside it. JSON lines go to FILE (default: standard output), progress and the table to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from services.bench import names, servers, transfers
from services.bench.adapters import make_adapter
from services.bench.progress import console, says
from services.bench.results import Result, print_table, write_lines
from services.bench.seeding import copy_log, seed

PREFIX = "bench"

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything. megabytes: of the adapter that is registered and pulled; seconds: a block of calls at
    `rate` a second lasts; rounds: of A, B after the one that warms up; moves: of aliases that watchers see."""

    megabytes: float
    rounds: int
    s3_rounds: int
    pulls: int
    pulled_megabytes: float
    adapters: int
    rate: float
    seconds: float
    call_rounds: int
    starts: int
    watchers: int
    moves: int


FULL = Sizes(100, 9, 7, 64, 100, 10_000, 500, 5, 4, 4, 100, 100)
QUICK = Sizes(50, 3, 2, 64, 21, 4_000, 500, 2, 1, 1, 100, 30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute instead of six: fewer rounds")
    parser.add_argument(
        "--out", type=Path, default=None, help="append the JSON lines to this; default: standard output"
    )
    options = parser.parse_args()
    servers.end_with_sigterm()
    began = time.monotonic()
    results = run(QUICK if options.quick else FULL)
    write_lines(results, options.out)
    print_table(results, console, f"Adapter store, {time.monotonic() - began:.0f} s")
    return 0


def run(sizes: Sizes) -> list[Result]:
    """Every benchmark, in a temporary directory and on servers of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-store-") as directory, contextlib.ExitStack() as stack:
        work = Path(directory)
        return [*_transfers(sizes, work / "bytes", stack), *_names(sizes, work / "names", stack)]


def _transfers(sizes: Sizes, work: Path, stack: contextlib.ExitStack) -> Iterator[Result]:
    work.mkdir()
    with says("starting the S3 server"):
        s3 = stack.enter_context(servers.s3(work / "s3"))
    bare = stack.enter_context(servers.program(["-m", "services.bench.bare", str(work)], log=work / "bare.log"))
    files, small = make_adapter(sizes.megabytes), make_adapter(sizes.pulled_megabytes)
    places: dict[str, list[str]] = {"disk": [], "S3": s3.flags(PREFIX)}
    pulled: dict[str, str] = {}
    for where, flags in places.items():
        with servers.store(work / where, *flags, environment=s3.environment) as store:
            with says(f"register, {where}"):
                rounds = sizes.rounds if where == "disk" else sizes.s3_rounds
                result, digest = _do(transfers.registering(store, bare, files, rounds=rounds, where=where))
                pulled[where] = _do(transfers.register_one(store, small))
                yield result
            with says(f"pull, {where}"):
                if where == "disk":
                    blob = work / where / "blobs" / "sha256" / digest[7:9] / digest[7:]
                    yield _do(transfers.pulling(store, bare, digest, blob, rounds=sizes.rounds))
                else:
                    yield _do(transfers.pulling_s3(store, s3, PREFIX, digest, work, rounds=sizes.s3_rounds))
    for where, flags in places.items():  # in processes that have registered nothing
        with (
            says(f"{sizes.pulls} pulls at once, {where}"),
            servers.store(work / where, *flags, environment=s3.environment) as store,
        ):
            yield _do(transfers.memory(store, pulled[where], pulls=sizes.pulls, where=where))


def _names(sizes: Sizes, work: Path, stack: contextlib.ExitStack) -> Iterator[Result]:
    work.mkdir()
    with says("starting Redis"):
        redis = stack.enter_context(servers.redis(work / "redis"))
    root, empty = work / "store", work / "empty"
    with says(f"{sizes.adapters} adapters: one upload, then their logs' entries through the journal"):
        seed(root, sizes.adapters)
    with says("the same on Redis, from the log"):
        copy_log(root, redis)
    indexes: dict[str, list[str]] = {"SQLite": [], "Redis": ["--index", redis]}
    with says("start"):
        yield from names.starting(root, empty, indexes, adapters=sizes.adapters, starts=sizes.starts)
    with contextlib.ExitStack() as running:
        stores = {name: running.enter_context(servers.store(root, *flags)) for name, flags in indexes.items()}
        with says(f"resolve at {sizes.rate:g}/s"):
            yield from _do(
                names.resolving(
                    stores, adapters=sizes.adapters, rate=sizes.rate, seconds=sizes.seconds, rounds=sizes.call_rounds
                )
            )
        with says("listing"):
            for name, store in stores.items():
                yield _do(names.listing(store, index=name, adapters=sizes.adapters, rounds=sizes.call_rounds))
        with says(f"watch, {sizes.watchers} watchers"):
            for name, store in stores.items():
                yield _do(names.watching(store, index=name, watchers=sizes.watchers, moves=sizes.moves))


def _do(coroutine: Coroutine[Any, Any, Found]) -> Found:
    return asyncio.run(coroutine)


if __name__ == "__main__":
    sys.exit(main())
