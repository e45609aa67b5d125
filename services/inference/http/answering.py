"""An answer as an ASGI response: whole, or as server-sent events. A client that goes away ends the generation."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from services.common.errors import Cancelled, MultiloraError
from services.inference.http.answers import AnswerFormat, ChatFormat, CompletionFormat
from services.inference.http.errors import error_body
from services.inference.http.openai import ChatRequest, OpenAIRequest
from services.inference.serving import Chunk, Event, Finished, Serving, Started

EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Answer(Response):
    """Generates when it is called. An error before the first event is raised, and so gets its own status."""

    def __init__(self, serving: Serving, request: OpenAIRequest) -> None:
        self.background = None
        self._serving = serving
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_disconnected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._serving.generate(self._request.generation())) as events:
            started = await _started(events)
            kind = ChatFormat if isinstance(self._request, ChatRequest) else CompletionFormat
            answer = kind(self._request.model, started)
            if self._request.stream:
                await self._stream(answer, events, scope["path"], send)
            else:
                await JSONResponse(await _whole(answer, events))(scope, receive, send)

    async def _stream(self, answer: AnswerFormat, events: AsyncGenerator[Event, None], path: str, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEADERS})
        try:
            async for piece in _pieces(answer, events, include_usage=self._request.stream_options.include_usage):
                await send(_frame(_compact(piece)))
        except MultiloraError as error:
            await send(_frame(_compact(error_body(error, path))))
        await send(_frame("[DONE]"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _started(events: AsyncGenerator[Event, None]) -> Started:
    """The first event. Raises Cancelled when the request ended before its first step."""
    first = await anext(events)
    if not isinstance(first, Started):
        raise Cancelled("CANCELLED", "the server cancelled the request before it began; ask again")
    return first


async def _whole(answer: AnswerFormat, events: AsyncGenerator[Event, None]) -> dict[str, Any]:
    chunks: list[Chunk] = []
    async for event in events:
        if isinstance(event, Chunk):
            chunks.append(event)
        elif isinstance(event, Finished):
            return answer.whole(chunks, event)
    raise AssertionError("a generation ended without Finished")


async def _pieces(
    answer: AnswerFormat, events: AsyncGenerator[Event, None], *, include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """With `include_usage` every piece has `usage`, null in all but the last, as OpenAI sends it."""
    null_usage = {"usage": None} if include_usage else {}
    if (first := answer.first()) is not None:
        yield first | null_usage
    async for event in events:
        if isinstance(event, Chunk):
            yield answer.piece(event) | null_usage
        elif isinstance(event, Finished):
            yield answer.last(event) | null_usage
            if include_usage:
                yield answer.usage_piece(event)


def _compact(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def _frame(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end, or cancel it as soon as the client is gone."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
        await asyncio.wait({working, watching})
    if not working.cancelled():
        working.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
