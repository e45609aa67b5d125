"""An upload's stream of messages: a header, then chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from multilora.adapter_store.v1 import admin_pb2
from services.adapter_store.upload import Upload
from services.common.errors import InvalidArgument
from services.common.wire import Chunk, UploadPart

_WAITING_CHUNKS = 4  # received and not yet written


async def receive_header(parts: AsyncIterator[UploadPart | None]) -> admin_pb2.RegisterVersionHeader:
    async for part in parts:
        if isinstance(part, admin_pb2.RegisterVersionHeader):
            return part
        break
    raise InvalidArgument("MISSING_HEADER", "the first message of an upload is its header", field="header")


async def receive_files(parts: AsyncIterator[UploadPart | None], upload: Upload) -> None:
    """Write every chunk while others come; the upload is discarded when the stream breaks, and as soon as a chunk is
    refused."""
    chunks = asyncio.Queue[Chunk | None](_WAITING_CHUNKS)
    tasks = [asyncio.ensure_future(_receive(parts, chunks)), asyncio.ensure_future(_write(chunks, upload))]
    try:
        await asyncio.gather(*tasks)
    except BaseException:  # a cancelled call, too
        for task in tasks:
            task.cancel()
        await asyncio.to_thread(upload.discard)
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _receive(parts: AsyncIterator[UploadPart | None], chunks: asyncio.Queue[Chunk | None]) -> None:
    async for part in parts:
        if not isinstance(part, Chunk):
            raise InvalidArgument("MISSING_CHUNK", "after the header only chunks come", field="chunk")
        await chunks.put(part)
    await chunks.put(None)


async def _write(chunks: asyncio.Queue[Chunk | None], upload: Upload) -> None:
    """Until None comes; all that are waiting in one go, as going to a thread and back costs more than a small chunk."""
    is_last = False
    while not is_last:
        waiting = [await chunks.get()]
        while not chunks.empty():
            waiting.append(chunks.get_nowait())
        is_last = waiting[-1] is None
        await asyncio.to_thread(_write_all, upload, [chunk for chunk in waiting if chunk is not None])


def _write_all(upload: Upload, chunks: list[Chunk]) -> None:
    for chunk in chunks:
        upload.write(chunk.file, chunk.data)
