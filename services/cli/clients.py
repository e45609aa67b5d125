"""Calls to the two services, with their errors as `services.common.errors`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from multilora.inference.v1.control_pb2_grpc import AdapterControlServiceStub
from multilora.inference.v1.inference_pb2_grpc import InferenceServiceStub
from services.cli.targets import Targets
from services.common.auth.credentials import Credentials, Metadata
from services.common.auth.settings import admin_address
from services.common.errors import DeadlineExceeded, MultiloraError, Unavailable
from services.common.rpc import MAX_MESSAGE_BYTES, from_rpc_error
from services.common.wire import AdminStub


@contextlib.contextmanager
def inference(targets: Targets) -> Iterator[InferenceServiceStub]:
    """The inference service. Leaving the context, by an interrupt too, cancels what is in flight."""
    with _channel(targets, targets.server, "inference service", "--server") as channel:
        yield InferenceServiceStub(channel)


@contextlib.contextmanager
def control(targets: Targets) -> Iterator[AdapterControlServiceStub]:
    """The inference service's administration."""
    address = targets.server_admin or admin_address(targets.server)
    with _channel(targets, address, "administration of the inference service", "--server-admin") as channel:
        yield AdapterControlServiceStub(channel)


def store_admin_address(targets: Targets) -> str:
    return targets.store_admin or admin_address(targets.store)


def credentials_of(targets: Targets) -> Credentials:
    return Credentials(
        ca=targets.ca, cert=targets.cert, key=targets.key, token=targets.token, token_file=targets.token_file
    )


@contextlib.contextmanager
def store_admin(targets: Targets) -> Iterator[AdminStub]:
    """The adapter store's administration."""
    with _channel(
        targets, store_admin_address(targets), "administration of the adapter store", "--store-admin"
    ) as channel:
        yield AdminStub(channel)


class _Caller(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
):
    """Shows the token, and names who asks, in the metadata of every call."""

    def __init__(self, actor: str, credentials: Credentials) -> None:
        sendable = bool(actor) and actor.isascii() and actor.isprintable()
        self._metadata: Metadata = (("x-multilora-actor", actor),) if sendable else ()
        self._metadata += credentials.metadata()

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
def _channel(targets: Targets, address: str, what: str, option: str) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    credentials = credentials_of(targets)
    caller = _Caller(targets.actor, credentials)
    with credentials.channel(address, options) as channel:
        try:
            yield grpc.intercept_channel(channel, caller)
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            raise (_of_channel(error, address, what, option, targets.timeout) or error) from rpc_error


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
