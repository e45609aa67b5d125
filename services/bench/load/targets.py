"""The two ways to ask a server: our gRPC stream, and OpenAI's completions as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import grpc
import grpc.aio

from multilora.common.v1 import common_pb2
from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from services.bench.load.answer import Answer
from services.bench.load.plan import Backend, Planned
from services.common.auth.credentials import NONE_SHOWN, Credentials, Metadata
from services.common.errors import InvalidArgument, MultiloraError, Unavailable
from services.common.rpc import MAX_MESSAGE_BYTES, from_rpc_error

_LINE_BYTES = 1 << 20


class Target(Protocol):
    """A server that is asked."""

    async def ask(self, request: Planned, answer: Answer) -> None:
        """Send one request and note in `answer` what comes, and when. Raises MultiloraError when it fails."""


@contextlib.asynccontextmanager
async def connect(
    backend: Backend, address: str, *, model: str = "", credentials: Credentials = NONE_SHOWN
) -> AsyncIterator[Target]:
    """A target at host:port (gRPC) or a base URL (OpenAI); model: the base model's name over HTTP.

    Raises Unavailable when nothing answers over HTTP.
    """
    if backend is Backend.OPENAI:
        server = _HttpServer.at(address, credentials)
        yield HttpTarget(server, model or await _first_model(server))
        return
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.use_local_subchannel_pool", 1)]
    async with credentials.aio_channel(address, options) as channel:
        yield GrpcTarget(channel, credentials.metadata())


class GrpcTarget:
    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata) -> None:
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._metadata = metadata

    async def ask(self, request: Planned, answer: Answer) -> None:
        message = inference_pb2.GenerateRequest(
            adapter=request.adapter,
            token_ids=inference_pb2.TokenIds(ids=request.prompt),
            stopping=inference_pb2.StoppingParams(max_tokens=request.max_tokens, ignore_eos=request.ignore_eos),
        )
        try:
            async for event in self._stub.Generate(message, metadata=self._metadata):
                match event.WhichOneof("event"):
                    case "started":
                        answer.num_input, answer.version = event.started.prompt_tokens, event.started.version
                        answer.tier = common_pb2.Tier.Name(event.started.tier).removeprefix("TIER_")
                    case "chunk" if event.chunk.token_ids:
                        answer.pieces.append(time.perf_counter())
                        answer.num_output += len(event.chunk.token_ids)
                    case "finished" if event.finished.reason == inference_pb2.FINISH_REASON_CANCELLED:
                        raise Unavailable("CANCELLED", "the server cancelled the answer before it was complete")
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None


@dataclass(frozen=True, slots=True)
class _HttpServer:
    """encryption: None speaks plain text; headers: of every request, each line ended"""

    host: str
    port: int
    encryption: ssl.SSLContext | None
    headers: str

    @classmethod
    def at(cls, url: str, credentials: Credentials) -> Self:
        """Raises InvalidArgument."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidArgument(
                "INVALID_FIELD", f"--base-url is {url!r}; give http://host:port, or https", field="--base-url"
            )
        encryption = credentials.http_context() if parts.scheme == "https" else None
        shown = "".join(f"{name}: {value!s}\r\n" for name, value in credentials.metadata())
        return cls(parts.hostname, parts.port or (443 if encryption else 80), encryption, shown)


class HttpTarget:
    """A connection per request. Reads just the HTTP/1.1 that servers stream with, as a client that parses all of it
    takes more of the machine than some servers do."""

    def __init__(self, server: _HttpServer, model: str) -> None:
        self._server, self._model = server, model

    async def ask(self, request: Planned, answer: Answer) -> None:
        body = {
            "model": request.adapter or self._model,
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "ignore_eos": request.ignore_eos,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with _exchange(self._server, "POST", "/v1/completions", body) as lines:
            async for line in lines:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                moment, piece = time.perf_counter(), json.loads(line[6:])
                if error := piece.get("error"):
                    raise Unavailable(_reason(error), str(error))
                for choice in piece.get("choices", ()):
                    if choice["text"] or choice.get("finish_reason") is None:
                        answer.pieces.append(moment)
                if usage := piece.get("usage"):
                    answer.num_input, answer.num_output = usage["prompt_tokens"], usage["completion_tokens"]


async def _first_model(server: _HttpServer) -> str:
    async with _exchange(server, "GET", "/v1/models") as lines:
        text = b"\n".join([line async for line in lines])
    return str(json.loads(text)["data"][0]["id"])


@contextlib.asynccontextmanager
async def _exchange(
    server: _HttpServer, method: str, path: str, body: Any = None
) -> AsyncIterator[AsyncIterator[bytes]]:
    """One request: the lines of the answer's body. Raises Unavailable without an answer, or one of another status."""
    where = f"{server.host}:{server.port}"
    try:
        reader, writer = await asyncio.open_connection(
            server.host, server.port, limit=_LINE_BYTES, ssl=server.encryption
        )
    except OSError as error:
        raise Unavailable("NOT_REACHABLE", f"no server answers at {where}: {error}") from error
    try:
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {where}\r\nConnection: close\r\n{server.headers}"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip().lower()
        chunked = headers.get("transfer-encoding") == "chunked"
        lines = _lines(_chunks(reader) if chunked else _rest(reader))
        if status != 200:
            raise Unavailable(_reason_of_body([line async for line in lines], status), f"{path} answered {status}")
        yield lines
    except (OSError, EOFError, IndexError) as error:
        raise Unavailable("CONNECTION_LOST", f"{where} ended the answer early: {error}") from error
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(_LINE_BYTES):
        yield data


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for data in chunks:
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest


def _reason_of_body(lines: list[bytes], status: int) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return _reason(json.loads(b"\n".join(lines))["error"])
    return f"HTTP_{status}"


def _reason(error: dict[str, Any]) -> str:
    return str(error.get("code") or error.get("type") or "ERROR")


def reason(error: BaseException) -> str:
    """A stable word for why a request failed."""
    return error.reason if isinstance(error, MultiloraError) else type(error).__name__
