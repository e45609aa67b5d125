"""The bare programs the store is measured against: `python -m services.bench.bare DIRECTORY`.

    /bare/Upload      a stream of raw bytes: hashed, written to a file, synced; answers with the digest
    /bare/Download    a path: the file's bytes in CHUNK_BYTES pieces

No messages to parse, no checks, no names: what grpc.aio, sha256 and the disk cost by themselves.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

CHUNK_BYTES = 1 << 20
_OPTIONS = [("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20)]
_CLOSE_SECONDS = 1.0


class Bare:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def upload(self, requests: AsyncIterator[bytes], _context: Any) -> bytes:
        digest = hashlib.sha256()
        fd = os.open(self._directory / secrets.token_hex(8), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            async for data in requests:
                digest.update(data)
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        return digest.digest()

    async def download(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:
        fd = os.open(request.decode(), os.O_RDONLY)
        try:
            while data := os.read(fd, CHUNK_BYTES):
                yield data
        finally:
            os.close(fd)


async def serve(directory: Path) -> None:
    bare = Bare(directory)
    server = grpc.aio.server(options=_OPTIONS)
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Upload": grpc.stream_unary_rpc_method_handler(bare.upload),
        "Download": grpc.unary_stream_rpc_method_handler(bare.download),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    try:
        await server.wait_for_termination()
    finally:
        await server.stop(_CLOSE_SECONDS)


if __name__ == "__main__":
    try:
        asyncio.run(serve(Path(sys.argv[1])))
    except KeyboardInterrupt:
        sys.exit(130)
