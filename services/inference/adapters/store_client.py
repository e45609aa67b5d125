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


class NameClient:
    """Resolves names, on the serving face's event loop."""

    def __init__(self, address: str, base_model: str) -> None:
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
            raise _while_resolving(from_rpc_error(error)) from None
        identity = response.identity
        return AdapterVersion(
            identity.adapter, int(identity.version), identity.digest, identity.pack_digest, int(identity.pack_size)
        )

    async def close(self) -> None:
        await self._channel.close()


class PullClient:
    """Pulls packed adapters, from the fetch workers' threads."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = store_pb2_grpc.AdapterStoreServiceStub(self._channel)

    def pull(self, adapter: AdapterVersion, offset: int = 0) -> Iterator[bytes]:
        """The packed bytes from `offset` on. Raises what the store raised, or Unavailable."""
        request = store_pb2.PullAdapterRequest(digest=adapter.pack_digest, offset=offset)
        try:
            for response in self._stub.PullAdapter(request):
                yield response.data
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def close(self) -> None:
        self._channel.close()


def _while_resolving(error: MultiloraError) -> MultiloraError:
    """What the store raised, told of the caller's own field; a store that does not answer in time is away."""
    if isinstance(error, DeadlineExceeded):
        return Unavailable("STORE_TIMEOUT", f"the adapter store did not answer within {RESOLVE_TIMEOUT:g} s; try again")
    if isinstance(error, InvalidArgument | NotFound | FailedPrecondition):
        error.field = "adapter"
    return error
