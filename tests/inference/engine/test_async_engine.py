"""Requests as streams: an id may be used again as soon as its stream is closed, whatever the engine has yet to say."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from services.common.errors import Unavailable
from services.inference.async_engine import AsyncEngine
from services.inference.engine.loop import EngineLoop
from services.inference.engine.messages import AddRequest, EngineInput, RequestOutput, RequestStarted
from services.inference.engine.request import StoppingParams
from tests.inference.engine.simulation import script
from tests.inference.engine.test_engine import add, make_bench

Outputs = AsyncGenerator[RequestStarted | RequestOutput, None]


def start() -> AsyncEngine:
    inbox: queue.SimpleQueue[EngineInput] = queue.SimpleQueue()
    return AsyncEngine(EngineLoop(make_bench().engine, inbox))


async def tokens(outputs: Outputs) -> list[int]:
    return [token async for output in outputs if isinstance(output, RequestOutput) for token in output.token_ids]


def answer(message: AddRequest) -> list[int]:
    return script(message.prompt_token_ids, None, StoppingParams(message.stopping.max_tokens))[0]


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
