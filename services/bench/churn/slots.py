"""Sixteen adapters over eight slots, beside the same load with all of them resident."""

from __future__ import annotations

from services.bench.churn.ground import Ground, alternate_loads, failures, ratio_figure
from services.bench.load.answer import Answer
from services.bench.load.plan import Backend, Load
from services.bench.load.popularity import Mix, Popularity
from services.bench.load.summary import summarise
from services.bench.load.targets import connect
from services.bench.results import Result, spread

ADAPTERS, SLOTS, CONCURRENCY = 16, 8, 16
TTFT_MEDIAN, TTFT_P99, THROUGHPUT = 2.0, 4.0, 0.8


async def slots(ground: Ground) -> Result:
    """As many requests in flight as adapters, each asking for another."""
    adapters = ground.fleet[:ADAPTERS]

    def load(number: int) -> Load:
        return ground.sizes.load(number, max_concurrency=CONCURRENCY, popularity=Popularity(mix=Mix.DISTINCT))

    with (
        ground.replica("resident", "--max-loras", str(ADAPTERS)) as resident,
        ground.replica("slots", "--max-loras", str(SLOTS)) as few,
    ):
        async with connect(Backend.GRPC, resident.grpc) as all_of_them, connect(Backend.GRPC, few.grpc) as eight:
            found = await alternate_loads(
                {"resident": all_of_them, "slots": eight}, load, adapters, ground.sizes.rounds
            )
    metrics = {name: [summarise(answers) for answers in rounds] for name, rounds in found.items()}

    def ratios(metric: str) -> list[float]:
        pairs = zip(metrics["slots"], metrics["resident"], strict=True)
        return [here.get(metric, 0.0) / there[metric] for here, there in pairs]

    name = f"{ADAPTERS} adapters over {SLOTS} slots ÷ all resident"
    asked: list[Answer] = [answer for rounds in found.values() for answers in rounds for answer in answers]
    figures = [
        ratio_figure(f"{name}: TTFT, median", ratios("median_ttft_ms"), TTFT_MEDIAN, at_most=True),
        ratio_figure(f"{name}: TTFT, p99", ratios("p99_ttft_ms"), TTFT_P99, at_most=True),
        ratio_figure(f"{name}: output tokens/s", ratios("output_throughput"), THROUGHPUT, at_most=False),
        failures(asked),
    ]
    shown = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "p99_itl_ms")
    spreads = {
        kind: {metric: spread([each.get(metric, 0.0) for each in rounds]) for metric in shown}
        for kind, rounds in metrics.items()
    }
    setup = ground.setup(adapters=ADAPTERS, slots=SLOTS, max_concurrency=CONCURRENCY, prompts=ground.sizes.prompts)
    return Result("churn_slots", setup, spreads, figures)
