"""Writes an adapter in the packed layout of services/common/packed.py.

Tensor by tensor, so memory holds one transposed B a thread at most; deterministic, so the same content has one pack
digest.
Two passes: the header comes first and carries the runs' checksums, and hashing the file as it is written needs the
header's bytes before any run's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
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

_CHECKSUM_THREADS = 2  # runs are independent, and zlib and numpy let go of the interpreter


def pack(
    modules: tuple[CheckedModule, ...],
    weights: memoryview,
    *,
    content_digest: str,
    base_model: str,
    write: Callable[[Buffer], None],
) -> PackedHeader:
    """Pack `modules`, which stand in layer order, from the mapped safetensors file; `write` gets the bytes in order."""
    sources = {module.name: module for module in modules}
    placed, sizes = _place(modules)

    def checksummed(index: int) -> PackedLayer:
        (offset, size), crc = sizes[index], 0
        for piece in _run(index, offset, placed, sources, weights):
            crc = zlib.crc32(piece, crc)
        return PackedLayer(index, offset, size, f"{crc:08x}")

    with ThreadPoolExecutor(_CHECKSUM_THREADS, "checksum") as threads:
        layers = list(threads.map(checksummed, sizes))
    header = PackedHeader(content_digest, base_model, tuple(layers), tuple(placed))
    write(encode_header(header))
    end = 0
    for layer in layers:
        write(b"\0" * (layer.offset - end))
        for piece in _run(layer.index, layer.offset, placed, sources, weights):
            write(piece)
        end = layer.offset + layer.size
    return header


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


def _run(
    layer: int, offset: int, placed: list[PackedModule], sources: dict[str, CheckedModule], weights: memoryview
) -> Iterator[Buffer]:
    """The bytes of one layer's run, piece by piece, with the zeros between tensors."""
    end = offset
    for module in placed:
        if module.layer != layer:
            continue
        source = sources[module.name]
        yield b"\0" * (module.a_offset - end)
        yield weights[source.a.begin : source.a.end]
        yield b"\0" * (module.b_offset - module.a_offset - module.a_bytes)
        yield np.ascontiguousarray(bits_of(weights, source.b).T).data.cast("B")
        end = module.b_offset + module.b_bytes
