"""The packed layout: an adapter's bytes as they travel from the store to a slot.

    0      magic "MLORAPAK"
    8      format version, uint32 little-endian
    12     length n of the header, uint32 little-endian
    16     header, n bytes of UTF-8 JSON, then zeros up to a multiple of 4096
    …      one run per layer that has modules, in layer order, each starting at a multiple of 4096

Offsets count from the payload, the first byte after the header's padding. Within a run each module has A as [r, in]
and then B as [r, out], so that both are rank rows; rank exact, in the dtype uploaded, every tensor at a multiple of 64.
The scale is in the header: it multiplies the shrink result in float32, so no weight is rounded twice. A load is one
sequential read, then one copy per layer; nothing is parsed, transposed or rescaled on the way.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from services.common.errors import DataLoss

MAGIC = b"MLORAPAK"
FORMAT_VERSION = 1
RUN_ALIGNMENT = 4096
TENSOR_ALIGNMENT = 64
MAX_HEADER_BYTES = 16 << 20
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}

_PREFIX = struct.Struct("<8sII")


@dataclass(frozen=True, slots=True)
class PackedModule:
    """One linear's A and B.

    name: full name, `model.layers.0.self_attn.q_proj`
    a_offset, b_offset: bytes from the start of the payload
    """

    name: str
    layer: int
    rank: int
    scale: float
    dtype: str
    in_features: int
    out_features: int
    a_offset: int
    b_offset: int

    @property
    def a_bytes(self) -> int:
        return self.rank * self.in_features * ITEM_SIZES[self.dtype]

    @property
    def b_bytes(self) -> int:
        return self.rank * self.out_features * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One layer's run: `size` bytes at `offset` of the payload.

    crc32: of the run, as 8 hex digits, so that a header's length is known before its runs are written
    """

    index: int
    offset: int
    size: int
    crc32: str


@dataclass(frozen=True, slots=True)
class PackedHeader:
    """What the file holds and where."""

    content_digest: str
    base_model: str
    layers: tuple[PackedLayer, ...]
    modules: tuple[PackedModule, ...]

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules)

    @property
    def payload_size(self) -> int:
        return max(layer.offset + layer.size for layer in self.layers)


def align(offset: int, alignment: int) -> int:
    """The next multiple of `alignment` at or after `offset`."""
    return -(-offset // alignment) * alignment


def largest_run(linears: Iterable[tuple[int, int]], rank: int) -> int:
    """Bytes of a layer's run at most: every linear (in, out) at this rank, in the widest dtype."""
    widest = max(ITEM_SIZES.values())
    tensors = (align(rank * width * widest, TENSOR_ALIGNMENT) for linear in linears for width in linear)
    return align(sum(tensors), RUN_ALIGNMENT)


def encode_header(header: PackedHeader) -> bytes:
    """The file's first bytes, up to the payload."""
    body = json.dumps(asdict(header), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(body)) + body
    return prefix.ljust(align(len(prefix), RUN_ALIGNMENT), b"\0")


def header_bytes(start: bytes) -> int:
    """How many of the file's first bytes `decode_header` needs, as its first 16 say; a damaged file's may say much."""
    _, _, length = _PREFIX.unpack_from(start.ljust(_PREFIX.size, b"\0"))
    return _PREFIX.size + min(int(length), MAX_HEADER_BYTES)


def decode_header(data: bytes | memoryview, total_size: int) -> tuple[PackedHeader, int]:
    """Read and check a header: the header, and where the payload starts.

    `data` holds at least the header's bytes; `total_size` is the whole file's. Every offset is checked against the
    file, so that a reader may slice without looking again.
    Raises DataLoss with reason PACKED_CORRUPT or PACKED_VERSION_UNKNOWN.
    """
    data = memoryview(data)
    if len(data) < _PREFIX.size:
        raise _corrupt("it ends within the first 16 bytes")
    magic, version, length = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise _corrupt("it does not start as a packed adapter does")
    if version != FORMAT_VERSION:
        raise DataLoss(
            "PACKED_VERSION_UNKNOWN",
            f"packed format {version} is not known here, {FORMAT_VERSION} is; upgrade this service",
        )
    if length > MAX_HEADER_BYTES or len(data) < _PREFIX.size + length:
        raise _corrupt(f"its header claims {length} bytes")
    try:
        header = _from_fields(json.loads(bytes(data[_PREFIX.size : _PREFIX.size + length])))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _corrupt(f"its header does not parse ({error})") from error
    payload = align(_PREFIX.size + length, RUN_ALIGNMENT)
    _check(header, total_size - payload)
    return header, payload


def _from_fields(fields: dict[str, Any]) -> PackedHeader:
    header = PackedHeader(
        content_digest=fields["content_digest"],
        base_model=fields["base_model"],
        layers=tuple(PackedLayer(**layer) for layer in fields["layers"]),
        modules=tuple(PackedModule(**module) for module in fields["modules"]),
    )
    _expect((header.content_digest, header.base_model), str)
    for layer in header.layers:
        _expect((layer.index, layer.offset, layer.size), int)
        _expect((layer.crc32,), str)
    for module in header.modules:
        _expect((module.name, module.dtype), str)
        _expect((module.layer, module.rank, module.in_features, module.out_features), int)
        _expect((module.a_offset, module.b_offset), int)
        _expect((module.scale,), float)
    return header


def _expect(values: Iterable[object], kind: type) -> None:
    for value in values:
        if type(value) is not kind:
            raise TypeError(f"{value!r} is no {kind.__name__}")


def _check(header: PackedHeader, payload_size: int) -> None:
    if not header.modules:
        raise _corrupt("it has no modules")
    runs = {layer.index: layer for layer in header.layers}
    end = 0
    for layer in header.layers:
        if layer.offset % RUN_ALIGNMENT or layer.offset < end or layer.size <= 0:
            raise _corrupt(f"the run of layer {layer.index} is misplaced")
        end = layer.offset + layer.size
    if end != payload_size or len(runs) != len(header.layers):
        raise _corrupt(f"its runs end at {end} of {payload_size} bytes")
    if len({module.name for module in header.modules}) != len(header.modules):
        raise _corrupt("a module is in it twice")
    for module in header.modules:
        run = runs.get(module.layer)
        if run is None or module.dtype not in ITEM_SIZES or module.rank < 1 or not math.isfinite(module.scale):
            raise _corrupt(f"{module.name} has a senseless layer, dtype, rank or scale")
        if module.in_features < 1 or module.out_features < 1:
            raise _corrupt(f"{module.name} has a senseless shape")
        for offset, size in ((module.a_offset, module.a_bytes), (module.b_offset, module.b_bytes)):
            if offset % TENSOR_ALIGNMENT or offset < run.offset or offset + size > run.offset + run.size:
                raise _corrupt(f"{module.name} lies outside its layer's run")


def _corrupt(why: str) -> DataLoss:
    return DataLoss("PACKED_CORRUPT", f"the packed adapter is damaged: {why}; pull it again")
