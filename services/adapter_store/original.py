"""A version's original weights, put together from their header and the pack, which holds every other byte."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from contextlib import closing

from services.adapter_store.blobs.interface import BlobReader, Blobs
from services.adapter_store.records import VersionContent
from services.adapter_store.safetensors_header import TensorEntry, parse_header
from services.adapter_store.tensor_keys import LoraKey, normalise
from services.common.errors import DataLoss
from services.common.packed import PackedHeader, decode_header, header_bytes


def open_weights(blobs: Blobs, content: VersionContent) -> BlobReader:
    """A version's weights as they were uploaded. Raises NotFound, Unavailable, DataLoss."""
    if not content.weights_header_digest:
        return blobs.open(content.weights_digest)
    with closing(blobs.open(content.weights_header_digest)) as reader:
        header = reader.read(0, reader.size)
    if f"sha256:{hashlib.sha256(header).hexdigest()}" != content.weights_header_digest:
        raise _damaged(f"{content.weights_header_digest} has other bytes")
    pack = blobs.open(content.pack_digest)
    try:
        return OriginalWeights(header, pack)
    except BaseException:
        pack.close()
        raise


class OriginalWeights:
    """Open for reading at any offset, by one thread; memory holds a tensor. Closes the pack with itself."""

    def __init__(self, header: bytes, pack: BlobReader) -> None:
        """Raises DataLoss when the pack is damaged."""
        self._header = header
        self._pack = pack
        self._entries = list(parse_header(memoryview(header), is_whole=False).values())
        self._begins = [entry.begin for entry in self._entries]
        self.size = self._entries[-1].end
        start = pack.read(0, header_bytes(pack.read(0, 16)))
        packed, self._payload = decode_header(start, pack.size)
        self._places = _places(self._entries, packed)
        self._last: tuple[str, bytes | memoryview] = ("", b"")

    def read(self, offset: int, length: int) -> bytes:
        """As BlobReader.read. Raises NotFound, Unavailable."""
        pieces, end = [self._header[offset : offset + length]], min(offset + length, self.size)
        at = offset + len(pieces[0])
        while at < end:
            entry = self._entries[bisect_right(self._begins, at) - 1]
            piece = self._tensor(entry)[at - entry.begin : end - entry.begin]
            pieces.append(bytes(piece))
            at += len(piece)
        return b"".join(pieces)

    def read_now(self, buffer: memoryview, offset: int) -> int | None:  # noqa: ARG002
        return None

    def close(self) -> None:
        self._pack.close()

    def _tensor(self, entry: TensorEntry) -> bytes | memoryview:
        """All of a tensor as it was uploaded; the last one is kept, as a file is read from start to end."""
        if self._last[0] != entry.name:
            self._last = entry.name, self._restored(entry)
        return self._last[1]

    def _restored(self, entry: TensorEntry) -> bytes | memoryview:
        from services.adapter_store.weights import transposed  # numpy comes with it: see registration.py

        size, (offset, is_turned) = entry.end - entry.begin, self._places[entry.name]
        data = self._pack.read(self._payload + offset, size)
        if len(data) != size:
            raise _damaged("the pack ends early")
        rows, columns = entry.shape
        return transposed(data, entry.dtype, (columns, rows)) if is_turned else data


def _places(entries: list[TensorEntry], packed: PackedHeader) -> dict[str, tuple[int, bool]]:
    """By a tensor's name: where the payload has it, and whether turned. Raises DataLoss when it has not."""
    modules = {module.name: module for module in packed.modules}
    places = {}
    for entry in entries:
        key = normalise(entry.name)
        module = modules.get(key.module) if isinstance(key, LoraKey) else None
        if module is None or not isinstance(key, LoraKey):
            raise _damaged(f"the pack has no {entry.name}")
        is_turned = key.side == "B"
        if (module.b_bytes if is_turned else module.a_bytes) != entry.end - entry.begin:
            raise _damaged(f"the pack has another {entry.name}")
        places[entry.name] = (module.b_offset if is_turned else module.a_offset, is_turned)
    return places


def _damaged(why: str) -> DataLoss:
    return DataLoss("BLOB_CORRUPT", f"the weights cannot be put together: {why}; restore it, or register them again")
