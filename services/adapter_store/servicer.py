"""AdapterStoreService: what replicas call."""

# ruff: noqa: ARG002 -- a handler takes what the contract hands it
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import grpc
import grpc.aio

from multilora.adapter_store.v1 import store_pb2, store_pb2_grpc
from services.adapter_store import convert
from services.adapter_store.blobs.interface import BlobReader
from services.adapter_store.feed import Feed
from services.adapter_store.store import AdapterStore
from services.common.auth.callers import check_still_known, referenced
from services.common.errors import DataLoss
from services.common.wire import MAX_HEAD_BYTES, pull_head

# A read and a message each. With 64 pulls at once, messages of 1 MiB took three times the memory; what has to be waited
# for, as from S3, is held longest.
PULL_CHUNK_BYTES = 256 << 10
CACHED_CHUNK_BYTES = 512 << 10

SERVICE = store_pb2.DESCRIPTOR.services_by_name["AdapterStoreService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class AdapterStoreServicer(store_pb2_grpc.AdapterStoreServiceServicer):
    def __init__(self, store: AdapterStore, feed: Feed) -> None:
        self._store = store
        self._feed = feed
        self._scratch = memoryview(bytearray(MAX_HEAD_BYTES + CACHED_CHUNK_BYTES))

    def add_to(self, server: grpc.aio.Server) -> None:
        store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(self, server)
        # once more, without a serialiser
        pull: grpc.RpcMethodHandler[store_pb2.PullAdapterRequest, bytes] = grpc.unary_stream_rpc_method_handler(
            self.PullAdapter, request_deserializer=store_pb2.PullAdapterRequest.FromString
        )
        server.add_registered_method_handlers(SERVICE, {"PullAdapter": pull})

    async def GetBaseModel(
        self, request: store_pb2.GetBaseModelRequest, context: Context
    ) -> store_pb2.GetBaseModelResponse:
        profile = await asyncio.to_thread(self._store.catalog.profile, request.name)
        return store_pb2.GetBaseModelResponse(profile=convert.profile_message(profile))

    async def ResolveAdapter(
        self, request: store_pb2.ResolveAdapterRequest, context: Context
    ) -> store_pb2.ResolveAdapterResponse:
        reference = referenced(request.reference, field="reference")
        versions = await asyncio.to_thread(self._store.catalog.resolve, reference, base_model=request.base_model)
        return convert.resolved_message(str(reference), versions, request.routing_key)

    async def PullAdapter(  # type: ignore[override]  # its responses come serialised: see add_to
        self, request: store_pb2.PullAdapterRequest, context: Context
    ) -> AsyncIterator[bytes]:
        reader = await asyncio.to_thread(self._store.open_pack, request.digest, request.offset)
        with closing(reader):
            offset, total_size = request.offset, reader.size
            while (left := reader.size - offset) > 0:
                message, count = await self._read(reader, offset, left, total_size)
                yield message
                offset, total_size = offset + count, 0
            if total_size:  # nothing was left to send, but the size
                yield store_pb2.PullAdapterResponse(total_size=total_size).SerializeToString()

    async def _read(self, reader: BlobReader, offset: int, left: int, total_size: int) -> tuple[bytes, int]:
        """The next message, and how many of the blob's bytes it holds; a thread reads what has to be waited for."""
        # shared by all pulls: nothing is awaited before it is copied
        count = reader.read_now(self._scratch[MAX_HEAD_BYTES : MAX_HEAD_BYTES + min(left, CACHED_CHUNK_BYTES)], offset)
        if not count:
            data = await asyncio.to_thread(reader.read, offset, min(left, PULL_CHUNK_BYTES))
            if not data:
                raise DataLoss("BLOB_CUT_SHORT", f"the blob ends {left} bytes early; verify the store")
            return pull_head(len(data), total_size) + data, len(data)
        head = pull_head(count, total_size)
        begin = MAX_HEAD_BYTES - len(head)
        self._scratch[begin:MAX_HEAD_BYTES] = head
        return bytes(self._scratch[begin : MAX_HEAD_BYTES + count]), count

    async def WatchAdapters(
        self, request: store_pb2.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[store_pb2.WatchAdaptersResponse]:
        async for event in self._feed.watch(request.after_revision, request.epoch):
            check_still_known()
            yield convert.watch_message(event)
