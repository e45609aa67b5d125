"""Adapters that come from the node's disk while others stream, beside requests for one that is resident."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from services.bench.churn.ground import Ground, failures, ratio_figure
from services.bench.load.answer import Answer
from services.bench.load.driver import ask, keep_asking
from services.bench.load.plan import Backend, Planned, endless
from services.bench.load.popularity import Mix, Popularity
from services.bench.load.targets import Target, connect
from services.bench.quantile import quantile
from services.bench.results import Result, spread

RESIDENT, COLD = 8, 12
BLOCKS = 3
"""Of each kind in a round, in turn: eight streams share a step, so a p99 is of few steps, and one disturbance tells."""
ITL_P99 = 1.1


async def cold(ground: Ground) -> Result:
    """Between the moments a cold request is sent and has its first token, the gaps between the others' tokens.

    Host memory holds the resident ones and one more, so a cold adapter is back on disk when its turn comes again.
    The request beside it has the same prompt, for its own prefill delays the others too.
    """
    sizes = ground.sizes
    busy, colds = ground.fleet[:RESIDENT], ground.fleet[RESIDENT : RESIDENT + COLD]
    cold_turn = itertools.cycle(colds)
    gaps: dict[str, list[list[float]]] = {"warm": [], "cold": []}
    tiers: Counter[str] = Counter()
    asked: list[Answer] = []
    room = str(RESIDENT + 1)
    with ground.replica("cold", "--max-loras", room, "--max-cpu-loras", room) as replica:
        async with connect(Backend.GRPC, replica.grpc) as target:
            asked += [await ask(target, _short(each)) for each in (*colds, *busy)]
            for number in range(sizes.rounds + 1):
                found: dict[str, list[float]] = {kind: [] for kind in gaps}
                for block, kind in itertools.product(range(BLOCKS), gaps):
                    probed = itertools.repeat(busy[0]) if kind == "warm" else cold_turn
                    others, probes = await _block(ground, target, busy, probed, BLOCKS * number + block)
                    asked += [*others, *probes]
                    found[kind] += _gaps_during(others, probes)
                    if number and kind == "cold":
                        tiers.update(answer.tier for answer in probes)
                for kind in gaps if number else ():
                    gaps[kind].append(found[kind])
    p99 = {kind: [quantile(found, 0.99) for found in rounds] for kind, rounds in gaps.items()}
    ratios = [cold / warm for cold, warm in zip(p99["cold"], p99["warm"], strict=True)]
    figures = [
        ratio_figure(
            "a cold adapter is loaded from disk: others' ITL p99 ÷ without",
            ratios,
            ITL_P99,
            at_most=True,
            note="cold requests met " + ", ".join(f"{count} × {tier}" for tier, count in sorted(tiers.items())),
        ),
        failures(asked),
    ]
    metrics = {
        "others_p99_itl_ms": {kind: spread([value * 1e3 for value in values]) for kind, values in p99.items()},
        "gaps": {kind: sum(map(len, rounds)) for kind, rounds in gaps.items()},
        "cold_tiers": dict(tiers),
    }
    setup = ground.setup(resident=RESIDENT, cold=COLD, seconds=BLOCKS * sizes.seconds / 2)
    return Result("churn_cold", setup, metrics, figures)


async def _block(
    ground: Ground, target: Target, busy: Sequence[str], probed: Iterator[str], number: int
) -> tuple[list[Answer], list[Answer]]:
    """The others' answers, and those of probes that follow one another, each for the next of `probed`: half as long as
    a timed block is elsewhere."""
    load = ground.sizes.load(number, popularity=Popularity(mix=Mix.DISTINCT))
    prompts = endless(ground.sizes.load(10_000 + number, random_output_len=2), [])
    until, probes = asyncio.Event(), list[Answer]()

    async def probe() -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + ground.sizes.seconds / 2
        while loop.time() < end:
            prompt = next(prompts)
            probes.append(await ask(target, Planned(next(probed), prompt.prompt, prompt.max_tokens, 0.0)))
        until.set()

    others, _ = await asyncio.gather(
        keep_asking(target, endless(load, busy), max_concurrency=len(busy), until=until), probe()
    )
    return others, probes


def _short(adapter: str) -> Planned:
    return Planned(adapter, range(20, 28), 1, 0.0)


def _gaps_during(others: Sequence[Answer], probes: Sequence[Answer]) -> list[float]:
    """Gaps between the others' pieces during which a probe waited for its first token."""
    waits = [(probe.sent, probe.pieces[0]) for probe in probes if probe.pieces]
    return [
        after - before
        for answer in others
        for before, after in itertools.pairwise(answer.pieces)
        if any(sent <= after and before <= first for sent, first in waits)
    ]
