"""An upload's stream of messages: a header, then chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from multilora.adapter_store.v1 import admin_pb2
from services.adapter_store.upload import Upload
from services.common.errors import InvalidArgument

UploadRequest = admin_pb2.RegisterVersionRequest | admin_pb2.ValidateVersionRequest


async def receive_header(requests: AsyncIterator[UploadRequest]) -> admin_pb2.RegisterVersionHeader:
    async for request in requests:
        if request.WhichOneof("part") == "header":
            return request.header
        break
    raise InvalidArgument("MISSING_HEADER", "the first message of an upload is its header", field="header")


async def receive_files(requests: AsyncIterator[UploadRequest], upload: Upload) -> None:
    """Write every chunk, each while the next one comes; the upload is discarded when the stream breaks or a chunk is
    refused."""
    writing: asyncio.Future[None] | None = None
    try:
        async for request in requests:
            if request.WhichOneof("part") != "chunk":
                raise InvalidArgument("MISSING_CHUNK", "after the header only chunks come", field="chunk")
            if writing is not None:
                await writing
            writing = asyncio.ensure_future(asyncio.to_thread(upload.write, request.chunk.file, request.chunk.data))
        if writing is not None:
            await writing
    except BaseException:  # a cancelled call, too
        await asyncio.to_thread(upload.discard)
        if writing is not None:
            await asyncio.gather(writing, return_exceptions=True)
        raise
