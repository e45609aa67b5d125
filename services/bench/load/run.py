"""One measured run from settings to a `Result`, and a sweep of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from services.bench.load.answer import Answer
from services.bench.load.driver import nothing, run_load
from services.bench.load.plan import Backend, Load
from services.bench.load.popularity import Mix
from services.bench.load.summary import Wanted, summarise
from services.bench.load.targets import connect
from services.bench.results import Figure, Result
from services.common.auth.credentials import NONE_SHOWN, Credentials

BENCHMARK = "load"


async def measure(
    backend: Backend,
    address: str,
    load: Load,
    adapters: Sequence[str],
    *,
    model: str = "",
    credentials: Credentials = NONE_SHOWN,
    wanted: Wanted | None = None,
    on_end: Callable[[Answer], None] = nothing,
) -> Result:
    """Run the load once. Raises Unavailable when no server answers over HTTP."""
    async with connect(backend, address, model=model, credentials=credentials) as target:
        answers = await run_load(target, load, adapters, on_end)
    metrics = summarise(answers, wanted)
    return Result(BENCHMARK, setup(backend, load, len(adapters)), metrics, figures(metrics))


def setup(backend: Backend, load: Load, num_adapters: int) -> dict[str, Any]:
    """The settings as the result keeps them: flat, and `inf` as a word, which JSON lacks."""
    values = {name: value for name, value in dataclasses.asdict(load).items() if name != "popularity"}
    popularity = {
        name: str(value) if name == "mix" else value for name, value in dataclasses.asdict(load.popularity).items()
    }
    rate = "inf" if math.isinf(load.request_rate) else load.request_rate
    return {"backend": str(backend), "num_adapters": num_adapters, **values, "request_rate": rate, **popularity}


def figures(metrics: dict[str, Any]) -> list[Figure]:
    """The rows of the table a person sees."""
    errors = ", ".join(f"{count} × {reason}" for reason, count in sorted(metrics["errors"].items()))
    rows = [
        Figure("answered", metrics["completed"], note=f"in {metrics['duration']:.1f} s"),
        Figure("failed", metrics["failed"], note=errors),
        Figure("adapters in flight at once, mean", metrics["adapters_in_flight"]),
    ]
    units = {"request_throughput": " req/s", "output_throughput": " tok/s", "total_token_throughput": " tok/s"}
    rows += [Figure(name.replace("_", " "), metrics[name], unit) for name, unit in units.items() if name in metrics]
    for name, value in metrics.items():
        if name.startswith("median_"):
            metric = name.removeprefix("median_").removesuffix("_ms")
            beside = [
                f"{other.removesuffix(f'_{metric}_ms')} {figure:.1f}"
                for other, figure in metrics.items()
                if other.endswith(f"_{metric}_ms") and other != name
            ]
            rows.append(Figure(f"{metric.upper()}, median", value, " ms", note=", ".join(beside)))
    return rows


def sweep(
    load: Load, rates: Sequence[float], concurrencies: Sequence[int], mixes: Sequence[Mix], adapters: Sequence[int]
) -> Iterator[tuple[Load, int]]:
    """Every combination, with its number of adapters."""
    for rate, concurrency, mix, count in itertools.product(rates, concurrencies, mixes, adapters):
        popularity = dataclasses.replace(load.popularity, mix=mix)
        yield (
            dataclasses.replace(load, request_rate=rate, max_concurrency=concurrency, popularity=popularity),
            count,
        )
