"""The numbers of an adapter's tensors: views of the mapped file, and checks that touch every value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from services.adapter_store.safetensors_header import TensorEntry

# Names of the dtypes served, as the packed layout spells them.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class _Layout:
    """A float's bits. An exponent of all ones is inf or NaN; a magnitude of no bits is zero, of either sign."""

    bits: np.dtype[np.unsignedinteger[Any]]
    exponent: int
    magnitude: int


_LAYOUTS = {
    "F32": _Layout(np.dtype("<u4"), 0x7F80_0000, 0x7FFF_FFFF),
    "F16": _Layout(np.dtype("<u2"), 0x7C00, 0x7FFF),
    "BF16": _Layout(np.dtype("<u2"), 0x7F80, 0x7FFF),
}
# Values looked at in one go: scratch that stays in a core's cache, and that the allocator hands out again at once.
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Values:
    """What a pass over a tensor found."""

    non_finite: int
    all_zero: bool


def transposed(data: bytes | memoryview, dtype: str, shape: tuple[int, int]) -> memoryview:
    """The bytes of a matrix, turned; as unsigned integers, as numpy has no bfloat16."""
    bits = np.frombuffer(data, _LAYOUTS[dtype].bits).reshape(shape)
    return np.ascontiguousarray(bits.T).data.cast("B")


def inspect(data: memoryview, entry: TensorEntry) -> Values:
    """Read every value of a tensor of a served dtype; `data` is the tensor's."""
    layout = _LAYOUTS[entry.dtype]
    flat = np.frombuffer(data, layout.bits)
    non_finite = largest = 0
    for start in range(0, flat.size, _CHUNK):
        magnitudes = flat[start : start + _CHUNK] & layout.magnitude
        top = int(magnitudes.max())
        if top >= layout.exponent:
            non_finite += int(np.count_nonzero(magnitudes >= layout.exponent))
        largest = max(largest, top)
    return Values(non_finite, largest == 0)
