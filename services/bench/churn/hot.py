"""One adapter with nine tenths of the traffic, beside the traffic of the others alone."""

from __future__ import annotations

from dataclasses import replace

from services.bench.churn.ground import Ground, failures, ratio_figure
from services.bench.load.answer import Answer
from services.bench.load.driver import run_load, send
from services.bench.load.plan import Backend, plan
from services.bench.load.popularity import Mix, Popularity
from services.bench.load.summary import summarise, values_of
from services.bench.load.targets import connect
from services.bench.quantile import quantile
from services.bench.results import Result, spread

ADAPTERS, CONCURRENCY = 8, 16
SHARE = 0.9
LOADED = 0.8
"""The offered rate as a part of what the server can answer: busy, but not past its means."""
BLOCKS = 4
"""A round lasts so many timed blocks: the others have few requests, and a p95 wants twenty."""
TTFT_P95 = 2.0


async def hot(ground: Ground) -> Result:
    """Arrivals at a rate measured in the same run. Alone, the others' requests come at the same moments, with prompts
    as long that no cache has seen."""
    adapters, sizes = ground.fleet[:ADAPTERS], ground.sizes
    skewed = Popularity(mix=Mix.SKEWED, skew_share=SHARE)
    rounds: dict[str, list[list[Answer]]] = {"mixed": [], "alone": []}
    asked: list[Answer] = []
    with ground.replica("hot", "--max-loras", str(ADAPTERS)) as replica:
        async with connect(Backend.GRPC, replica.grpc) as target:
            closed = sizes.load(0, max_concurrency=CONCURRENCY, num_warmups=ADAPTERS)
            asked += await run_load(target, closed, adapters)
            rate = LOADED * summarise(asked)["request_throughput"]
            for number in range(1, sizes.rounds + 1):
                load = sizes.load(
                    number,
                    request_rate=rate,
                    num_prompts=max(2 * ADAPTERS, round(rate * BLOCKS * sizes.seconds)),
                    popularity=skewed,
                )
                requests = plan(load, adapters)
                others = [
                    replace(request, prompt=request.prompt[::-1])
                    for request in requests
                    if request.adapter != adapters[0]
                ]
                mixed, alone = await send(target, requests), await send(target, others)
                rounds["mixed"].append([answer for answer in mixed if answer.adapter != adapters[0]])
                rounds["alone"].append(alone)
                asked += [*mixed, *alone]

    def p95(answers: list[Answer]) -> float:
        return quantile(values_of(answers, "ttft"), 0.95)

    by_round = {kind: [p95(answers) for answers in found if answers] for kind, found in rounds.items()}
    ratios = [mixed / alone for mixed, alone in zip(by_round["mixed"], by_round["alone"], strict=True)]
    of_others = {kind: spread([value * 1e3 for value in values]) for kind, values in by_round.items()}
    count = sum(map(len, rounds["alone"]))
    figures = [
        ratio_figure(
            f"one adapter has {SHARE:.0%} of the traffic: others' TTFT p95 ÷ alone",
            ratios,
            TTFT_P95,
            at_most=True,
            note=f"{of_others['mixed']['median']:.0f} and {of_others['alone']['median']:.0f} ms, {count} requests each",
        ),
        failures(asked),
    ]
    offered = {"request_rate": rate, "of_capacity": LOADED, "seconds": BLOCKS * sizes.seconds}
    setup = ground.setup(adapters=ADAPTERS, share=SHARE, **offered)
    return Result("churn_hot", setup, {"others_p95_ttft_ms": of_others, "others": count}, figures)
