"""What a replica asks of the adapter store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator

import grpc
import grpc.aio

from multilora.adapter_store.v1 import admin_pb2, store_pb2, store_pb2_grpc
from multilora.common.v1 import common_pb2
from services.common.auth.credentials import Credentials, callers_metadata
from services.common.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MultiloraError,
    NotFound,
    Unavailable,
)
from services.common.profile import BaseModelProfile, Shape
from services.common.rpc import MAX_MESSAGE_BYTES, from_rpc_error
from services.common.split import Target
from services.common.wire import UPLOAD_CHUNK_BYTES, AdminStub, Chunk, UploadPart
from services.inference.adapter_paths import AdapterFiles
from services.inference.engine.request import AdapterVersion
from services.inference.name_watch import Message, News
from services.inference.resolver import Meaning

# A channel that could not connect sleeps before it tries again, and refuses calls meanwhile, though the store may be
# back. Left to gRPC the sleeps grow to two minutes.
_SIZE = ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)
_OPTIONS = [_SIZE, ("grpc.max_reconnect_backoff_ms", 2_000)]
# Equal channels of a process share a connection, and its sleep, unless told not to.
_CONNECT_NOW = [*_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
# Shorter than a pull's attempts take together (failures.py): none fails for its channel's sleep alone.
_PULL_OPTIONS = [_SIZE, ("grpc.max_reconnect_backoff_ms", 100)]
RESOLVE_TIMEOUT = 5.0
"""Seconds a resolve may take before the store counts as away."""
SLOWEST_PULL = 1e6
"""Bytes a second below which a pull counts as hung, after a minute's patience."""


class NameClient:
    """Resolves names and watches them, on the serving face's event loop."""

    def __init__(self, address: str, admin_address: str, base_model: str, credentials: Credentials) -> None:
        """admin_address: where the store is administered, which registering is part of"""
        self._address = address
        self._admin_address = admin_address
        self._base_model = base_model
        self._credentials = credentials
        self._channel = credentials.aio_channel(address, _OPTIONS)
        self._admin_channel = credentials.aio_channel(admin_address, _OPTIONS)
        self._stub = store_pb2_grpc.AdapterStoreServiceStub(self._channel)

    async def resolve(self, reference: str, known: bool) -> Meaning:
        """What a reference means. Raises what the store raised, or Unavailable.

        known: what it meant will do when the store is away; for a new name a sleeping channel is not taken at its word
        """
        request = store_pb2.ResolveAdapterRequest(reference=reference, base_model=self._base_model)
        metadata = self._credentials.metadata()
        async with contextlib.AsyncExitStack() as opened:
            stub = self._stub
            if not known and self._channel.get_state() == grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                own = await opened.enter_async_context(self._credentials.aio_channel(self._address, _CONNECT_NOW))
                stub = store_pb2_grpc.AdapterStoreServiceStub(own)
            try:
                response = await stub.ResolveAdapter(request, timeout=RESOLVE_TIMEOUT, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                raise _of_reference(_store_error(error, self._address)) from None
        versions = {
            Target(int(target.identity.version), target.weight): _version(target.identity)
            for target in response.targets
        }
        return Meaning(response.reference, versions)

    async def base_model(self) -> BaseModelProfile:
        """The served base model's profile. Raises NotFound when it is not registered, or Unavailable."""
        try:
            request = store_pb2.GetBaseModelRequest(name=self._base_model)
            metadata = self._credentials.metadata()
            profile = (await self._stub.GetBaseModel(request, timeout=RESOLVE_TIMEOUT, metadata=metadata)).profile
        except grpc.aio.AioRpcError as error:
            raise _store_error(error, self._address) from None
        return BaseModelProfile(
            name=profile.name,
            architecture=profile.architecture,
            num_layers=profile.num_layers,
            vocab_size=profile.vocab_size,
            modules={module.name: Shape(module.in_features, module.out_features) for module in profile.modules},
            accepted_names=tuple(profile.accepted_names),
            max_lora_rank=profile.max_lora_rank,
            lora_extra_vocab_size=profile.lora_extra_vocab_size,
            fingerprint=profile.fingerprint,
        )

    async def register(self, name: str, files: AdapterFiles, *, promote: bool) -> int:
        """Register the files as the adapter's next version, as the caller of this replica; its number.

        Raises what the store raised.
        """
        header = admin_pb2.RegisterVersionHeader(adapter=name, base_model=self._base_model, promote=promote)
        stub, metadata = AdminStub(self._admin_channel), callers_metadata() or self._credentials.metadata()
        try:
            answer = await stub.RegisterVersion(_upload(header, files), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise _store_error(error, self._admin_address) from None
        return int(answer.version.identity.version)

    async def watch(self, after_revision: int, epoch: str) -> AsyncGenerator[Message, None]:
        """Messages of the store's watch until it breaks. Raises what the store raised, or Unavailable."""
        request = store_pb2.WatchAdaptersRequest(after_revision=after_revision, epoch=epoch)
        try:
            async for response in self._stub.WatchAdapters(request, metadata=self._credentials.metadata()):
                yield _message(response)
        except grpc.aio.AioRpcError as error:
            raise _store_error(error, self._address) from None

    async def close(self) -> None:
        await self._channel.close()
        await self._admin_channel.close()


class PullClient:
    """Pulls packed adapters, from the fetch workers' threads."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        self._address = address
        self._credentials = credentials
        self._channel = credentials.channel(address, _PULL_OPTIONS)
        self._stub = store_pb2_grpc.AdapterStoreServiceStub(self._channel)

    def pull(self, adapter: AdapterVersion, offset: int = 0) -> Iterator[bytes]:
        """The packed bytes from `offset` on. Raises what the store raised, or Unavailable."""
        request = store_pb2.PullAdapterRequest(digest=adapter.pack_digest, offset=offset)
        try:
            timeout, metadata = 60 + adapter.pack_size / SLOWEST_PULL, self._credentials.metadata()
            for response in self._stub.PullAdapter(request, timeout=timeout, metadata=metadata):
                yield response.data
        except grpc.RpcError as error:
            raise _store_error(error, self._address) from None

    def close(self) -> None:
        """Cancels what is being pulled, too."""
        self._channel.close()


async def _upload(header: admin_pb2.RegisterVersionHeader, files: AdapterFiles) -> AsyncGenerator[UploadPart, None]:
    yield header
    for name, file in files.items():
        while data := await asyncio.to_thread(file.read, UPLOAD_CHUNK_BYTES):
            yield Chunk(name, data)


def _version(identity: common_pb2.AdapterIdentity) -> AdapterVersion:
    return AdapterVersion(
        identity.adapter, int(identity.version), identity.digest, identity.pack_digest, int(identity.pack_size)
    )


def _message(response: store_pb2.WatchAdaptersResponse) -> Message:
    if response.reset or response.heartbeat:
        return Message(News.RESET if response.reset else News.HEARTBEAT, int(response.revision), response.epoch)
    if response.base_model:
        news = News.BASE_MODEL
    elif response.kind == common_pb2.CHANGE_KIND_VERSION_DELETED:
        news = News.DELETED
    else:
        news = News.CHANGED
    return Message(
        news,
        int(response.revision),
        response.epoch,
        response.adapter,
        int(response.version),
        response.alias,
        response.base_model,
    )


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
