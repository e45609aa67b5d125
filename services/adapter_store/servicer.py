"""AdapterStoreService: what replicas call."""

# ruff: noqa: ARG002 -- a handler takes what the contract hands it
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from multilora.adapter_store.v1 import store_pb2, store_pb2_grpc
from services.adapter_store import convert
from services.adapter_store.blobs.interface import BlobReader
from services.adapter_store.feed import Feed
from services.adapter_store.store import AdapterStore
from services.common.references import parse_reference

# A read and a message each. With 64 pulls at once, messages of 1 MiB took three times the memory; what has to be waited
# for, as from S3, is held longest.
PULL_CHUNK_BYTES = 256 << 10
CACHED_CHUNK_BYTES = 512 << 10

Context = grpc.aio.ServicerContext[Any, Any]


async def read_piece(reader: BlobReader, offset: int) -> bytes:
    """The next bytes, from a thread only if they have to be waited for."""
    data = reader.read_now(offset, CACHED_CHUNK_BYTES)
    return await asyncio.to_thread(reader.read, offset, PULL_CHUNK_BYTES) if data is None else data


class AdapterStoreServicer(store_pb2_grpc.AdapterStoreServiceServicer):
    def __init__(self, store: AdapterStore, feed: Feed) -> None:
        self._store = store
        self._feed = feed

    async def GetBaseModel(
        self, request: store_pb2.GetBaseModelRequest, context: Context
    ) -> store_pb2.GetBaseModelResponse:
        profile = await asyncio.to_thread(self._store.catalog.profile, request.name)
        return store_pb2.GetBaseModelResponse(profile=convert.profile_message(profile))

    async def ResolveAdapter(
        self, request: store_pb2.ResolveAdapterRequest, context: Context
    ) -> store_pb2.ResolveAdapterResponse:
        reference = parse_reference(request.reference, field="reference")
        versions = await asyncio.to_thread(self._store.catalog.resolve, reference, base_model=request.base_model)
        return convert.resolved_message(str(reference), versions, request.routing_key)

    async def PullAdapter(
        self, request: store_pb2.PullAdapterRequest, context: Context
    ) -> AsyncIterator[store_pb2.PullAdapterResponse]:
        reader = await asyncio.to_thread(self._store.open_pack, request.digest, request.offset)
        with reader.closing():
            offset, total_size = request.offset, reader.size
            while data := await read_piece(reader, offset):
                yield store_pb2.PullAdapterResponse(data=data, total_size=total_size)
                offset, total_size = offset + len(data), 0
            if total_size:  # nothing was left to send, but the size
                yield store_pb2.PullAdapterResponse(total_size=total_size)

    async def WatchAdapters(
        self, request: store_pb2.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[store_pb2.WatchAdaptersResponse]:
        async for event in self._feed.watch(request.after_revision, request.epoch):
            yield convert.watch_message(event)
