"""Writes an adapter in the packed layout of services/common/packed.py.

Tensor by tensor, in whatever order they come, so memory holds one transposed B at most; deterministic, so the same
content has one pack digest. The header comes first in the file and is written last: it carries the runs' checksums.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

from services.adapter_store.crc import joined
from services.adapter_store.safetensors_header import TensorEntry
from services.adapter_store.validation import CheckedModule
from services.adapter_store.weights import DTYPES, transposed
from services.common.packed import (
    ITEM_SIZES,
    RUN_ALIGNMENT,
    TENSOR_ALIGNMENT,
    PackedHeader,
    PackedLayer,
    PackedModule,
    align,
    encode_header,
)

Buffer = bytes | memoryview
WriteAt = Callable[[int, Buffer], None]  # offset in the file, bytes

_NO_DIGEST = f"sha256:{0:064x}"


class _Written(NamedTuple):
    """A tensor in the payload."""

    offset: int
    size: int
    crc32: int


class PackWriter:
    """A pack being written: `put` every tensor, then `finish`.

    modules: in layer order
    write_at: what it is not given is zeros
    """

    def __init__(self, modules: tuple[CheckedModule, ...], *, base_model: str, write_at: WriteAt) -> None:
        self._base_model = base_model
        self._write_at = write_at
        self._placed, self._runs = _place(modules)
        self._modules = {}
        for module, placed in zip(modules, self._placed, strict=True):
            self._modules[module.a.name] = self._modules[module.b.name] = placed
        self._turned = {module.b.name for module in modules}
        self._written: dict[int, list[_Written]] = {layer: [] for layer in self._runs}
        # a checksum of any value takes as much room, and so does a digest
        layers = [PackedLayer(index, *run, f"{0:08x}") for index, run in self._runs.items()]
        self._payload = len(encode_header(self._header(_NO_DIGEST, layers)))

    def put(self, entry: TensorEntry, data: memoryview) -> None:
        """Write one of the modules' tensors; `data` is all of it."""
        module = self._modules[entry.name]
        offset = module.a_offset
        if entry.name in self._turned:
            offset, data = module.b_offset, transposed(data, entry.dtype, (module.out_features, module.rank))
        self._write_at(self._payload + offset, data)
        self._written[module.layer].append(_Written(offset, len(data), zlib.crc32(data)))

    def finish(self, content_digest: str) -> PackedHeader:
        """Write the header, which is returned."""
        layers = [PackedLayer(index, *run, f"{self._crc32(index):08x}") for index, run in self._runs.items()]
        header = self._header(content_digest, layers)
        encoded = encode_header(header)
        assert len(encoded) == self._payload
        self._write_at(0, encoded)
        return header

    def _header(self, content_digest: str, layers: list[PackedLayer]) -> PackedHeader:
        return PackedHeader(content_digest, self._base_model, tuple(layers), tuple(self._placed))

    def _crc32(self, layer: int) -> int:
        """Of a run, from those of its tensors and of the zeros between them."""
        crc, end = 0, self._runs[layer][0]
        for tensor in sorted(self._written[layer]):
            crc = zlib.crc32(bytes(tensor.offset - end), crc)
            crc, end = joined(crc, tensor.crc32, tensor.size), tensor.offset + tensor.size
        return crc


def pack(
    modules: tuple[CheckedModule, ...],
    weights: memoryview,
    *,
    content_digest: str,
    base_model: str,
    write_at: WriteAt,
) -> PackedHeader:
    """Pack `modules`, which stand in layer order, from the mapped safetensors file."""
    writer = PackWriter(modules, base_model=base_model, write_at=write_at)
    for module in modules:
        for entry in (module.a, module.b):
            writer.put(entry, weights[entry.begin : entry.end])
    return writer.finish(content_digest)


def into(memory: bytearray) -> WriteAt:
    """For `pack`: the file's bytes in memory, which grows."""

    def write_at(offset: int, data: Buffer) -> None:
        memory.extend(bytes(max(0, offset + len(data) - len(memory))))
        memory[offset : offset + len(data)] = data

    return write_at


def _place(modules: tuple[CheckedModule, ...]) -> tuple[list[PackedModule], dict[int, tuple[int, int]]]:
    """Offsets of every tensor, and offset and size of every layer's run."""
    placed: list[PackedModule] = []
    runs: dict[int, tuple[int, int]] = {}
    end = 0
    for layer, in_layer in groupby(modules, key=lambda module: module.layer):
        start = end = align(end, RUN_ALIGNMENT)
        for module in in_layer:
            dtype = DTYPES[module.a.dtype]
            a_offset = align(end, TENSOR_ALIGNMENT)
            a_end = a_offset + module.rank * module.shape.in_features * ITEM_SIZES[dtype]
            b_offset = align(a_end, TENSOR_ALIGNMENT)
            end = b_offset + module.rank * module.shape.out_features * ITEM_SIZES[dtype]
            placed.append(
                PackedModule(
                    name=module.name,
                    layer=layer,
                    rank=module.rank,
                    scale=module.scale,
                    dtype=dtype,
                    in_features=module.shape.in_features,
                    out_features=module.shape.out_features,
                    a_offset=a_offset,
                    b_offset=b_offset,
                )
            )
        runs[layer] = (start, end - start)
    return placed, runs
