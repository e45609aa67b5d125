"""Errors cross the wire whole, and the server's own health service works behind the interceptor."""

# ruff: noqa: ARG001 -- handlers and their users take what they are handed
from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.errors import ERRORS_BY_CODE, InvalidArgument, MultiloraError, ResourceExhausted, Unavailable
from services.common.rpc import MAX_TEXT_BYTES, GrpcServer, from_rpc_error

TIMEOUT_SECONDS = 30
Raise = Callable[[], Exception]


class Raising(grpc.GenericRpcHandler):
    """Raises one error from a unary and from a streaming method."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def unary(request: bytes, context: Any) -> bytes:
            raise self._error

        async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
            yield b"first"
            raise self._error

        if handler_call_details.method == "/test/Unary":
            return grpc.unary_unary_rpc_method_handler(unary)
        if handler_call_details.method == "/test/Stream":
            return grpc.unary_stream_rpc_method_handler(stream)
        return None


def with_server(
    use: Callable[[GrpcServer, grpc.aio.Channel], Coroutine[Any, Any, None]], error: Exception | None = None
) -> None:
    async def run() -> None:
        server = GrpcServer(["test.Service"])
        if error is not None:
            server.server.add_generic_rpc_handlers((Raising(error),))
        port = server.bind("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await use(server, channel)
        finally:
            await server.stop(0)

    asyncio.run(run())


async def caught(call: Callable[[], Coroutine[Any, Any, Any]]) -> MultiloraError:
    try:
        await call()
    except grpc.RpcError as error:
        return from_rpc_error(error)
    raise AssertionError("no error came")


def over_the_wire(error: Exception) -> list[MultiloraError]:
    """What a client gets when a unary and a streaming handler raise `error`."""
    found: list[MultiloraError] = []

    async def use(server: GrpcServer, channel: grpc.aio.Channel) -> None:
        async def unary() -> None:
            await channel.unary_unary("/test/Unary")(b"", timeout=TIMEOUT_SECONDS)

        async def stream() -> None:
            async for _ in channel.unary_stream("/test/Stream")(b"", timeout=TIMEOUT_SECONDS):
                pass

        found.extend([await caught(unary), await caught(stream)])

    with_server(use, error)
    return found


@pytest.mark.parametrize("kind", ERRORS_BY_CODE.values())
def test_errors_cross_the_wire_whole(kind: type[MultiloraError]) -> None:
    sent = kind("SOME_REASON", "wrong, ä; do this", field="a.b", retry_after=1.5, rank=9)
    for got in over_the_wire(sent):
        assert type(got) is kind
        assert vars(got) == vars(sent)
        assert vars(pickle.loads(pickle.dumps(got))) == vars(sent)


def test_other_errors_tell_nothing() -> None:
    for got in over_the_wire(ValueError("secret")):
        assert (got.code, got.reason) == ("INTERNAL", "INTERNAL")
        assert "secret" not in got.message


def test_long_messages_still_arrive() -> None:
    sent = InvalidArgument("LONG", "ä" * 100_000, field="text", text="ö" * 100_000)
    for got in over_the_wire(sent):
        assert (type(got), got.reason) == (InvalidArgument, "LONG")
        assert len(got.message.encode()) <= MAX_TEXT_BYTES
        assert got.message.endswith("...")


def test_retry_info_is_optional() -> None:
    (got, _) = over_the_wire(ResourceExhausted("FULL", "later"))
    assert (got.retry_after, got.field) == (None, "")


def test_health_is_checked_and_watched() -> None:
    async def use(server: GrpcServer, channel: grpc.aio.Channel) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="test.Service")
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch = stub.Watch(request)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.set_serving(True)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()

    with_server(use)


def test_a_taken_port_is_told() -> None:
    async def run() -> None:
        first, second = GrpcServer([]), GrpcServer([])
        port = first.bind("127.0.0.1:0")
        with pytest.raises(Unavailable, match="ADDRESS_IN_USE"):
            second.bind(f"127.0.0.1:{port}")
        for server in (first, second):  # grpc.aio releases only what was started
            await server.start()
            await server.stop(0)

    asyncio.run(run())
