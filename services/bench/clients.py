"""Calls to a store and to the bare program, by the same kind of client on both sides."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager

import grpc
import grpc.aio

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc, store_pb2, store_pb2_grpc
from services.bench.adapters import BASE_MODEL, CONFIG_FILE, WEIGHTS_FILE, Files, base_config
from services.common.auth.credentials import NONE_SHOWN, Credentials, Metadata
from services.common.wire import UPLOAD_CHUNK_BYTES, AdminStub, Chunk, UploadPart

CHUNK_BYTES = 1 << 20
# Every client has connections of its own, as a replica has.
_OPTIONS = [
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.use_local_subchannel_pool", 1),
]

Sink = Callable[[bytes], object]


def connect(address: str, credentials: Credentials = NONE_SHOWN) -> AbstractAsyncContextManager[grpc.aio.Channel]:
    return credentials.aio_channel(address, _OPTIONS)


async def register_base(channel: grpc.aio.Channel) -> None:
    request = admin_pb2.RegisterBaseModelRequest(name=BASE_MODEL, config_json=base_config())
    await admin_pb2_grpc.AdapterAdminServiceStub(channel).RegisterBaseModel(request)


async def register(channel: grpc.aio.Channel, name: str, files: Files) -> str:
    """Upload an adapter's next version: its pack digest."""
    answer = await upload(channel, name, files, BASE_MODEL)
    assert not answer.existed, "the adapter was there already: nothing was measured"
    return answer.version.identity.pack_digest


async def upload(
    channel: grpc.aio.Channel, name: str, files: Files, base_model: str, *, metadata: Metadata = ()
) -> admin_pb2.RegisterVersionResponse:
    async def parts() -> AsyncIterator[UploadPart]:
        yield admin_pb2.RegisterVersionHeader(adapter=name, base_model=base_model)
        for file, content in ((CONFIG_FILE, files.config), (WEIGHTS_FILE, files.weights)):
            for data in _chunks(content, UPLOAD_CHUNK_BYTES):
                yield Chunk(file, data)

    answer: admin_pb2.RegisterVersionResponse = await AdminStub(channel).RegisterVersion(parts(), metadata=metadata)
    return answer


async def bare_upload(channel: grpc.aio.Channel, files: Files) -> None:
    async def messages() -> AsyncIterator[bytes]:
        for content in (files.config, files.weights):
            for data in _chunks(content, CHUNK_BYTES):
                yield bytes(data)

    upload: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary("/bare/Upload")
    await upload(messages())


async def pull(channel: grpc.aio.Channel, digest: str, sink: Sink = len) -> int:
    """All packed bytes, handed to `sink` piece by piece: how many there were."""
    received = 0
    request = store_pb2.PullAdapterRequest(digest=digest)
    async for message in store_pb2_grpc.AdapterStoreServiceStub(channel).PullAdapter(request):
        sink(message.data)
        received += len(message.data)
    return received


async def bare_download(channel: grpc.aio.Channel, path: str) -> int:
    download: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/bare/Download")
    received = 0
    async for data in download(path.encode()):
        received += len(data)
    return received


def _chunks(content: bytes | bytearray, size: int) -> Iterator[memoryview]:
    whole = memoryview(content)
    return (whole[start : start + size] for start in range(0, len(content), size))
