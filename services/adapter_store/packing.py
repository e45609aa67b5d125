"""Writes an adapter in the packed layout of services/common/packed.py.

Tensor by tensor, so memory holds one transposed B a thread at most; deterministic, so the same content has one pack
digest. The header comes first in the file and is written last: it carries the runs' checksums.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np

from services.adapter_store.validation import CheckedModule
from services.adapter_store.weights import DTYPES, bits_of
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

_THREADS = 2  # runs are independent, and zlib, numpy and the disk let go of the interpreter


def pack(
    modules: tuple[CheckedModule, ...],
    weights: memoryview,
    *,
    content_digest: str,
    base_model: str,
    write_at: WriteAt,
) -> PackedHeader:
    """Pack `modules`, which stand in layer order, from the mapped safetensors file.

    `write_at` is called from several threads; what it is not given is zeros.
    """
    sources = {module.name: module for module in modules}
    placed, runs = _place(modules)

    def header(layers: Iterable[PackedLayer]) -> PackedHeader:
        return PackedHeader(content_digest, base_model, tuple(layers), tuple(placed))

    # a checksum of any value takes as much room
    payload = len(encode_header(header(PackedLayer(index, *run, f"{0:08x}") for index, run in runs.items())))

    def write_run(index: int) -> PackedLayer:
        start, size = runs[index]
        crc, end = 0, start
        for offset, piece in _tensors(index, placed, sources, weights):
            write_at(payload + offset, piece)
            crc = zlib.crc32(piece, zlib.crc32(b"\0" * (offset - end), crc))
            end = offset + len(piece)
        return PackedLayer(index, start, size, f"{crc:08x}")

    with ThreadPoolExecutor(_THREADS, "pack") as threads:
        packed = header(threads.map(write_run, runs))
    write_at(0, encode_header(packed))
    return packed


def into(memory: bytearray) -> WriteAt:
    """For `pack`: the file's bytes in memory, which grows."""
    lock = threading.Lock()

    def write_at(offset: int, data: Buffer) -> None:
        with lock:
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


def _tensors(
    layer: int, placed: list[PackedModule], sources: dict[str, CheckedModule], weights: memoryview
) -> Iterator[tuple[int, memoryview]]:
    """One layer's tensors in order, each with its offset in the payload."""
    for module in placed:
        if module.layer == layer:
            source = sources[module.name]
            yield module.a_offset, weights[source.a.begin : source.a.end]
            yield module.b_offset, np.ascontiguousarray(bits_of(weights, source.b).T).data.cast("B")
