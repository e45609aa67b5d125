"""Requests as streams: an id may be used again as soon as its stream is closed, whatever the engine has yet to say."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from services.common.errors import ResourceExhausted, Unavailable
from services.inference.async_engine import AsyncEngine
from services.inference.engine.loop import EngineLoop
from services.inference.engine.messages import AddRequest, EngineInput, RequestFinished, RequestOutput, RequestStarted
from services.inference.engine.request import StoppingParams
from services.inference.hosting.thread import ThreadHost
from tests.inference.engine.simulation import script
from tests.inference.engine.test_engine import add, make_bench

Outputs = AsyncGenerator[RequestStarted | RequestOutput, None]


def start(max_unread_tokens: int = 1000) -> AsyncEngine:
    inbox: queue.SimpleQueue[EngineInput] = queue.SimpleQueue()
    return AsyncEngine(ThreadHost(EngineLoop(make_bench().engine, inbox)), max_unread_tokens)


async def tokens(outputs: Outputs) -> list[int]:
    return [token async for output in outputs if isinstance(output, RequestOutput) for token in output.token_ids]


def answer(message: AddRequest) -> list[int]:
    return script(message.prompt_token_ids, None, StoppingParams(message.stopping.max_tokens))[0]


async def read_late(engine: AsyncEngine, message: AddRequest) -> None:
    """Read, but only when the engine is done with the request."""
    async for _ in engine.generate(message):
        while (await engine.stats()).running:
            pass


@pytest.mark.parametrize("last_words_unread", [True, False])
@pytest.mark.parametrize("times", [1, 3])
def test_an_id_used_again(last_words_unread: bool, times: int) -> None:
    """Closed early with its last words already delivered, or still to be said; also several times in a row."""

    async def main() -> None:
        engine = start()
        for turn in range(20):
            for attempt in range(times):
                async with aclosing(engine.generate(add("same", [attempt, turn], max_tokens=9))) as outputs:
                    assert isinstance(await anext(outputs), RequestStarted)
                    while last_words_unread and (await engine.stats()).running:
                        pass
            message = add("same", [turn, 1], max_tokens=7)
            assert await tokens(engine.generate(message)) == answer(message)
            assert not engine.in_flight("same")
        stats = await engine.stats()
        assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks)
        await engine.shutdown(drain=True, timeout=30)
        with pytest.raises(Unavailable):
            await engine.stats()

    asyncio.run(main())


def test_a_reader_that_falls_behind() -> None:
    """What waits is bounded: the request is cancelled, its reader is told, and its id may be used again."""

    async def main() -> None:
        engine = start(max_unread_tokens=5)
        with pytest.raises(ResourceExhausted, match="more than 5 tokens unread"):
            await read_late(engine, add("same", [1, 2], max_tokens=50))
        message = add("same", [3, 1], max_tokens=5)
        assert await tokens(engine.generate(message)) == answer(message)
        await engine.shutdown(drain=True, timeout=30)

    asyncio.run(main())


def test_outputs_that_waited_come_as_one() -> None:
    async def main() -> None:
        engine = start()
        message = add("r", [4, 2], max_tokens=9)
        async with aclosing(engine.generate(message)) as outputs:
            assert isinstance(await anext(outputs), RequestStarted)
            while (await engine.stats()).running:
                pass
            rest = [output async for output in outputs if isinstance(output, RequestOutput)]
        assert len(rest) <= 2, "the first may have been taken with the start"
        assert [token for output in rest for token in output.token_ids] == answer(message)
        assert rest[0].times is not None
        assert rest[-1].finished == RequestFinished("LENGTH")
        await engine.shutdown(drain=True, timeout=30)

    asyncio.run(main())


def test_many_at_once_and_a_drain() -> None:
    async def main() -> None:
        engine = start()
        messages = [add(f"r{index}", [index, 2, 3], max_tokens=10) for index in range(12)]
        answers = [asyncio.create_task(tokens(engine.generate(message))) for message in messages]
        await engine.stats()
        await engine.shutdown(drain=True, timeout=30)
        assert await asyncio.gather(*answers) == [answer(message) for message in messages]
        with pytest.raises(Unavailable):
            await tokens(engine.generate(add("late", [1])))

    asyncio.run(main())
