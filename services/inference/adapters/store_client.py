"""What a replica asks of the adapter store."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import grpc.aio

from multilora.adapter_store.v1 import store_pb2, store_pb2_grpc
from services.common.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MultiloraError,
    NotFound,
    Unavailable,
)
from services.common.rpc import MAX_MESSAGE_BYTES, from_rpc_error
from services.inference.engine.request import AdapterVersion

_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
RESOLVE_TIMEOUT = 5.0
"""Seconds a resolve may take before the store counts as away."""
SLOWEST_PULL = 1e6
"""Bytes a second below which a pull counts as hung, after a minute's patience."""


class NameClient:
    """Resolves names, on the serving face's event loop."""

    def __init__(self, address: str, base_model: str) -> None:
        self._address = address
        self._base_model = base_model
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = store_pb2_grpc.AdapterStoreServiceStub(self._channel)

    async def resolve(self, reference: str, routing_key: str) -> AdapterVersion:
        """The version a reference means. Raises what the store raised, or Unavailable."""
        request = store_pb2.ResolveAdapterRequest(
            reference=reference, base_model=self._base_model, routing_key=routing_key
        )
        try:
            response = await self._stub.ResolveAdapter(request, timeout=RESOLVE_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise _of_reference(_store_error(error, self._address)) from None
        identity = response.identity
        return AdapterVersion(
            identity.adapter, int(identity.version), identity.digest, identity.pack_digest, int(identity.pack_size)
        )

    async def close(self) -> None:
        await self._channel.close()


class PullClient:
    """Pulls packed adapters, from the fetch workers' threads."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = store_pb2_grpc.AdapterStoreServiceStub(self._channel)

    def pull(self, adapter: AdapterVersion, offset: int = 0) -> Iterator[bytes]:
        """The packed bytes from `offset` on. Raises what the store raised, or Unavailable."""
        request = store_pb2.PullAdapterRequest(digest=adapter.pack_digest, offset=offset)
        try:
            for response in self._stub.PullAdapter(request, timeout=60 + adapter.pack_size / SLOWEST_PULL):
                yield response.data
        except grpc.RpcError as error:
            raise _store_error(error, self._address) from None

    def close(self) -> None:
        """Cancels what is being pulled, too."""
        self._channel.close()


def _store_error(rpc_error: grpc.RpcError, address: str) -> MultiloraError:
    """What the store raised; or, when it did not answer at all, that it is away."""
    error = from_rpc_error(rpc_error)
    if error.reason != error.code or not isinstance(error, Unavailable | DeadlineExceeded):
        return error
    return Unavailable(
        "STORE_UNAVAILABLE",
        f"the adapter store at {address} does not answer ({error.message}); try again",
        retry_after=1.0,
    )


def _of_reference(error: MultiloraError) -> MultiloraError:
    """What the store says of a reference, told of the caller's own field."""
    if isinstance(error, InvalidArgument | NotFound | FailedPrecondition):
        error.field = "adapter"
    return error
