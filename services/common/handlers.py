"""What interceptors of a server do to a handler: put something around its method, and leave the rest of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import grpc

Method = Callable[[Any, Any], Any]


def wrapped(handler: Any, unary: Callable[[Method], Method], streaming: Callable[[Method], Method]) -> Any:
    """The handler, its method inside `streaming` where that is an async generator, and inside `unary` otherwise.

    Not by what the handler gets: grpcio's own health Watch is no generator, it writes to the context.
    """
    sends = "stream" if handler.request_streaming else "unary"
    gets = "stream" if handler.response_streaming else "unary"
    method = getattr(handler, f"{sends}_{gets}")
    wrap = streaming if inspect.isasyncgenfunction(method) else unary
    make = getattr(grpc, f"{sends}_{gets}_rpc_method_handler")
    return make(wrap(method), handler.request_deserializer, handler.response_serializer)
