"""gRPC wiring that both services share: errors to statuses and back, and a server with health and reflection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from services.common.auth.audit import facts_of
from services.common.auth.guard import AUTHORIZATION, Guard, host_of
from services.common.auth.tls import Tls
from services.common.call_metrics import CallCounts
from services.common.errors import ERRORS_BY_CODE, Internal, MultiloraError, Unavailable
from services.common.handlers import wrapped

ERROR_DOMAIN = "multilora"
MAX_MESSAGE_BYTES = 8 << 20
HEALTHY = health_pb2.HealthCheckResponse.SERVING
# A status travels in HTTP/2 trailers, of which peers accept 8 KiB: the message percent-encoded, then again in base64.
MAX_TEXT_BYTES = 2400
MAX_DETAIL_BYTES = 400
UNHEALTHY = health_pb2.HealthCheckResponse.NOT_SERVING

log = logging.getLogger(__name__)


def to_status(error: MultiloraError) -> status_pb2.Status:
    """The google.rpc.Status of an error: ErrorInfo always; BadRequest, RetryInfo when it names a field, a time."""
    details: list[Any] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=ERROR_DOMAIN,
            metadata={key: _cut(value, MAX_DETAIL_BYTES) for key, value in error.metadata.items()},
        )
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=_cut(error.message, MAX_DETAIL_BYTES)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    message = _cut(error.message, MAX_TEXT_BYTES)
    return status_pb2.Status(code=code_pb2.Code.Value(error.code), message=message, details=packed)


def _cut(text: str, most: int) -> str:
    """The text, cut to `most` bytes: a caller's own input in a message must not make the answer undeliverable.

    Bytes outside printable ASCII count three times, as percent-encoding makes three of each.
    """
    data, end, left = text.encode(errors="replace"), 0, most - 3
    while end < len(data) and left >= 0:
        left -= 1 if 32 <= data[end] < 127 else 3
        end += 1
    return data.decode() if left >= 0 else data[: end - 1].decode(errors="ignore") + "..."


def from_rpc_error(error: grpc.RpcError) -> MultiloraError:
    """The error a server raised, rebuilt from what came over the wire."""
    code, message = error.code(), error.details() or ""
    kind = ERRORS_BY_CODE.get(code.name, Internal)
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # someone on the way changed the code, so the details are not about it
        status = None
    reason, metadata, field, retry_after = code.name, {}, "", None
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            request = error_details_pb2.BadRequest()
            detail.Unpack(request)
            field = request.field_violations[0].field if request.field_violations else ""
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return kind(reason, message, field=field, retry_after=retry_after, **metadata)


Door = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], contextlib.AbstractContextManager[None]]
"""What a call goes through, with its request (None for a stream of them) and context."""


def _open_door(_request: Any, _context: grpc.aio.ServicerContext[Any, Any]) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Lets in whom the guard lets in, and turns what is raised into a status: the one table from errors to the wire.

    Handlers just raise.
    """

    def __init__(self, guard: Guard | None) -> None:
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        door = _open_door if self._guard is None else _door(self._guard, handler_call_details)
        return wrapped(handler, partial(_unary, door=door), partial(_streaming, door=door))


def _door(guard: Guard, details: grpc.HandlerCallDetails) -> Door:
    found = next((value for key, value in details.invocation_metadata or () if key == AUTHORIZATION), None)
    authorization = found.decode(errors="replace") if isinstance(found, bytes) else found

    def door(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> contextlib.AbstractContextManager[None]:
        return guard.call(
            details.method,
            authorization,
            peer=lambda: host_of(context.peer()),
            names=lambda: _certificate_names(context),
            facts=lambda: facts_of(request),
        )

    return door


def _certificate_names(context: grpc.aio.ServicerContext[Any, Any]) -> list[str]:
    """The names in the client's certificate: its common name first, then its alternative ones."""
    found = context.auth_context() or {}
    keys = ("x509_common_name", "x509_subject_alternative_name")
    return [name.decode(errors="replace") for key in keys for name in found.get(key, ())]


def _unary(method: Callable[[Any, Any], Awaitable[Any]], door: Door) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            with door(request, context):
                return await method(request, context)
        except Exception as error:
            await _abort(context, error)

    return call


def _streaming(
    method: Callable[[Any, Any], AsyncGenerator[Any, None]], door: Door
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            with door(request, context):
                async with contextlib.aclosing(method(request, context)) as responses:
                    async for response in responses:
                        yield response
        except Exception as error:
            await _abort(context, error)

    return call


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, MultiloraError):
        log.error("a handler failed", exc_info=error)
        error = Internal("INTERNAL", "the server failed; its log says more")
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


class GrpcServer:
    """A grpc.aio server with health, reflection, a guard and the error table; health follows `set_serving`."""

    def __init__(
        self,
        service_names: Sequence[str],
        *,
        guard: Guard | None = None,
        tls: Tls | None = None,
        calls: CallCounts | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """guard, tls: None lets everybody call, in plain text
        calls: where this server's calls are counted, with those of others
        """
        self._tls = tls
        self.calls = CallCounts() if calls is None else calls
        self.server = grpc.aio.server(
            interceptors=[self.calls, CallInterceptor(guard)],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._names = ("", *service_names)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflected = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(reflected, self.server)

    def bind(self, address: str) -> int:
        """Listen on `host:port` (port 0: any free one) and return the port. Raises Unavailable when taken."""
        return _bind(self.server, address, self._tls)

    async def start(self) -> None:
        await self.set_serving(False)
        await self.server.start()

    async def set_serving(self, serving: bool) -> None:
        for name in self._names:
            await self._health.set(name, HEALTHY if serving else UNHEALTHY)

    @contextlib.asynccontextmanager
    async def health_at(self, address: str | None) -> AsyncIterator[None]:
        """Serve its health, and nothing else, in plain text too: a kubelet's probe speaks no TLS.

        address: None serves it nowhere else. Raises Unavailable when taken.
        """
        if address is None:
            yield
            return
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        _bind(server, address, None)
        await server.start()
        try:
            yield
        finally:
            await server.stop(0)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give those in flight `grace` seconds, then end."""
        await self.set_serving(False)
        await self.server.stop(grace)


def _bind(server: grpc.aio.Server, address: str, tls: Tls | None) -> int:
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, tls.server_credentials())
    except RuntimeError as error:
        raise Unavailable(
            "ADDRESS_IN_USE", f"cannot listen on {address}; another process may hold the port: {error}"
        ) from error


async def wait_for_signal() -> None:
    """Return when SIGTERM or SIGINT asks this process to end."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    await asked.wait()


async def first_of(*events: Coroutine[Any, Any, object]) -> None:
    """Return when the first of these has; the others are cancelled."""
    tasks = [asyncio.create_task(event) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
