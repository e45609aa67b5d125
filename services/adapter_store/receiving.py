"""An upload's stream of messages: a header, then chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from multilora.adapter_store.v1 import admin_pb2
from services.adapter_store.upload import Upload
from services.common.errors import InvalidArgument
from services.common.wire import Chunk, UploadPart


async def receive_header(parts: AsyncIterator[UploadPart | None]) -> admin_pb2.RegisterVersionHeader:
    async for part in parts:
        if isinstance(part, admin_pb2.RegisterVersionHeader):
            return part
        break
    raise InvalidArgument("MISSING_HEADER", "the first message of an upload is its header", field="header")


async def receive_files(parts: AsyncIterator[UploadPart | None], upload: Upload) -> None:
    """Write every chunk, each while the next one comes; the upload is discarded when the stream breaks or a chunk is
    refused."""
    writing: asyncio.Future[None] | None = None
    try:
        async for part in parts:
            if not isinstance(part, Chunk):
                raise InvalidArgument("MISSING_CHUNK", "after the header only chunks come", field="chunk")
            if writing is not None:
                await writing
            writing = asyncio.ensure_future(asyncio.to_thread(upload.write, part.file, part.data))
        if writing is not None:
            await writing
    except BaseException:  # a cancelled call, too
        await asyncio.to_thread(upload.discard)
        if writing is not None:
            await asyncio.gather(writing, return_exceptions=True)
        raise
