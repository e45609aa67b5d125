"""Sends planned requests when they are due, and gathers the answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from services.bench.load.answer import Answer
from services.bench.load.plan import Load, Planned, plan
from services.bench.load.targets import Target, reason
from services.common.errors import MultiloraError


def nothing(_answer: Answer) -> None:
    """For callers that show no progress."""


async def run_load(
    target: Target, load: Load, adapters: Sequence[str], on_end: Callable[[Answer], None] = nothing
) -> list[Answer]:
    """Warm up, then send the load's requests: the answers in the order of the plan, failed ones among them."""
    if load.num_warmups:
        # Other prompts, so that nothing of the counted ones is cached.
        warmup = replace(load, num_prompts=load.num_warmups, request_rate=float("inf"), seed=load.seed + 1)
        await send(target, plan(warmup, adapters), max_concurrency=load.max_concurrency or load.num_warmups)
    return await send(target, plan(load, adapters), max_concurrency=load.max_concurrency, on_end=on_end)


async def send(
    target: Target,
    requests: Sequence[Planned],
    *,
    max_concurrency: int | None = None,
    on_end: Callable[[Answer], None] = nothing,
) -> list[Answer]:
    """Each request at its time, or later while `max_concurrency` others are in flight."""
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    began = time.perf_counter()

    async def one(request: Planned) -> Answer:
        if (wait := began + request.due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        async with gate:
            answer = await ask(target, request)
        on_end(answer)
        return answer

    return await asyncio.gather(*map(one, requests))


async def keep_asking(
    target: Target,
    requests: Iterator[Planned],
    *,
    max_concurrency: int,
    until: asyncio.Event,
    on_end: Callable[[Answer], None] = nothing,
) -> list[Answer]:
    """That many in flight, each followed by the next, until the event is set: the answers in the order they ended."""
    answers: list[Answer] = []

    async def one_after_the_other() -> None:
        while not until.is_set():
            answers.append(await ask(target, next(requests)))
            on_end(answers[-1])

    await asyncio.gather(*(one_after_the_other() for _ in range(max_concurrency)))
    return answers


async def ask(target: Target, request: Planned) -> Answer:
    """One request; its failure is in the answer."""
    answer = Answer(request.adapter, time.perf_counter())
    try:
        await target.ask(request, answer)
        if not answer.pieces:
            answer.error = "EMPTY_ANSWER"
    except MultiloraError as error:
        answer.error = reason(error)
    answer.ended = time.perf_counter()
    return answer
