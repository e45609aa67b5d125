"""Counts of gRPC calls by how they ended, under the names that dashboards of go-grpc-prometheus know."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from services.common.handlers import wrapped

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class CallCounts(grpc.aio.ServerInterceptor):
    """Counts every call that ends, by service, method and code; first of a server's interceptors, it sees the code."""

    def __init__(self) -> None:
        self._handled: Counter[tuple[str, str, str]] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        _, service, name = handler_call_details.method.split("/")

        def ended(context: grpc.aio.ServicerContext[Any, Any], error: BaseException | None) -> None:
            self._handled[service, name, _code(context, error)] += 1

        return wrapped(handler, partial(_unary, ended=ended), partial(_streaming, ended=ended))

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        labels = ["grpc_service", "grpc_method", "grpc_code"]
        family = CounterMetricFamily("grpc_server_handled", "RPCs that ended, by code", labels=labels)
        for ends, count in sorted(self._handled.items()):
            family.add_metric(ends, count)
        yield family


Ended = Callable[["grpc.aio.ServicerContext[Any, Any]", BaseException | None], None]


def _code(context: grpc.aio.ServicerContext[Any, Any], error: BaseException | None) -> str:
    """In camel case, as those dashboards have it: NotFound. A call that was cut off set no code."""
    code = context.code()
    if isinstance(code, int) or code is None:  # grpc.aio has plain 0 until a code is set
        code = grpc.StatusCode.OK if error is None else grpc.StatusCode.CANCELLED
    return "OK" if code is grpc.StatusCode.OK else "".join(word.title() for word in code.name.split("_"))


def _unary(method: Callable[[Any, Any], Awaitable[Any]], ended: Ended) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            answer = await method(request, context)
        except BaseException as error:
            ended(context, error)
            raise
        ended(context, None)
        return answer

    return call


def _streaming(
    method: Callable[[Any, Any], AsyncGenerator[Any, None]], ended: Ended
) -> Callable[[Any, Any], AsyncGenerator[Any, None]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncGenerator[Any, None]:
        try:
            async for answer in method(request, context):
                yield answer
        except BaseException as error:
            ended(context, error)
            raise
        ended(context, None)

    return call
