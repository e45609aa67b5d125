"""The crc32 of bytes one after the other, from the crc32 of each.

crc32 is affine over GF(2): crc32(b, start) = crc32(b) ^ L(start), where L depends on b's length alone and is what as
many zero bytes do. L of n bytes is made of those of halves, so it takes log2(n) steps. Source: zlib's crc32_combine.
"""

from __future__ import annotations

import zlib
from functools import lru_cache


def joined(first: int, second: int, second_size: int) -> int:
    """crc32(a + b), given crc32(a), crc32(b) and the length of b."""
    return _apply(_zeros(second_size), first) ^ second


@lru_cache(maxsize=256)
def _zeros(size: int) -> tuple[int, ...]:
    """L for so many bytes, as what it makes of each of the 32 bits."""
    if size == 0:
        return tuple(1 << bit for bit in range(32))
    if size == 1:
        return tuple(zlib.crc32(b"\0", 1 << bit) ^ zlib.crc32(b"\0") for bit in range(32))
    half, rest = _zeros(size // 2), _zeros(size - size // 2)
    return tuple(_apply(half, column) for column in rest)


def _apply(columns: tuple[int, ...], value: int) -> int:
    found = 0
    for bit, column in enumerate(columns):
        if value >> bit & 1:
            found ^= column
    return found
