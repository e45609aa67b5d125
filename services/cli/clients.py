"""Calls to the two services, with their errors as `services.common.errors`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from multilora.inference.v1.control_pb2_grpc import AdapterControlServiceStub
from multilora.inference.v1.inference_pb2_grpc import InferenceServiceStub
from services.cli.targets import Targets
from services.common.errors import DeadlineExceeded, MultiloraError, Unavailable
from services.common.rpc import MAX_MESSAGE_BYTES, from_rpc_error
from services.common.wire import AdminStub

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class InferenceClient:
    generation: InferenceServiceStub
    control: AdapterControlServiceStub


@contextlib.contextmanager
def inference(targets: Targets) -> Iterator[InferenceClient]:
    """The inference service. Leaving the context, by an interrupt too, cancels what is in flight."""
    with _channel(targets.server, "inference service", "--server", targets.timeout) as channel:
        yield InferenceClient(InferenceServiceStub(channel), AdapterControlServiceStub(channel))


@contextlib.contextmanager
def store_admin(targets: Targets) -> Iterator[AdminStub]:
    """The adapter store's administration."""
    with _channel(targets.store, "adapter store", "--store", targets.timeout) as channel:
        yield AdminStub(grpc.intercept_channel(channel, _Actor(targets.actor)))


class _Actor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
):
    """Names who asks in the metadata of every call."""

    def __init__(self, actor: str) -> None:
        sendable = bool(actor) and actor.isascii() and actor.isprintable()
        self._metadata: Metadata = (("x-multilora-actor", actor),) if sendable else ()

    def _call(self, continuation: Callable[..., Any], details: grpc.ClientCallDetails, request: Any) -> Any:
        return continuation(_Details(details, (*(details.metadata or ()), *self._metadata)), request)

    intercept_unary_unary = _call  # type: ignore[assignment]
    intercept_unary_stream = _call  # type: ignore[assignment]
    intercept_stream_unary = _call  # type: ignore[assignment]


class _Details(grpc.ClientCallDetails):
    """A call's details with other metadata."""

    def __init__(self, details: grpc.ClientCallDetails, metadata: Metadata) -> None:
        self.method, self.timeout, self.credentials = details.method, details.timeout, details.credentials
        self.wait_for_ready, self.compression = details.wait_for_ready, details.compression
        self.metadata = metadata


@contextlib.contextmanager
def _channel(address: str, what: str, option: str, timeout: float) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    with grpc.insecure_channel(address, options) as channel:
        try:
            yield channel
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            raise (_of_channel(error, address, what, option, timeout) or error) from rpc_error


def _of_channel(error: MultiloraError, address: str, what: str, option: str, timeout: float) -> MultiloraError | None:
    """A plainer error for what the channel itself found, which has no reason of a server's; None for all else."""
    match error:
        case Unavailable(reason=Unavailable.code):
            message = f"no {what} answers at {address}; is it running there? {option} says where"
            return Unavailable("NOT_REACHABLE", message)
        case DeadlineExceeded(reason=DeadlineExceeded.code):
            message = f"the {what} was not done within {timeout:g} s; --timeout allows more"
            return DeadlineExceeded("DEADLINE_EXCEEDED", message)
        case _:
            return None
