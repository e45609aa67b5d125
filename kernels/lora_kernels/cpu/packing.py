"""Base weights as the compiled step reads them: panels of what they are, or of a quantized file's own blocks."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.cpu.build import load_library

BLOCK_INPUTS = 32
"""Inputs of a row that share their scale, as in blocks.h and in GGUF's files."""


class Storage(enum.IntEnum):
    """How packed weights lie in memory, as in memory.h."""

    AS_STORED = 0
    EIGHT_BITS = 1
    FOUR_BITS = 2
    TWELVE_BITS = 3


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Weights [out, in] of a quantized file: values * scales (+ least), 32 inputs of a row having them in common.

    values: [out, in] int8: -128 to 127, or with `least` 0 to 15
    scales, least: [out, in / 32] float32; where there is a least, scales have 11 bits, as of a float16
    """

    values: Tensor
    scales: Tensor
    least: Tensor | None = None

    def __post_init__(self) -> None:
        out, width = self.values.shape
        for groups in (self.scales, self.scales if self.least is None else self.least):
            if tuple(groups.shape) != (out, width // BLOCK_INPUTS) or width % BLOCK_INPUTS:
                raise ValueError(
                    f"weights [{out}, {width}] in blocks want a scale for every {BLOCK_INPUTS} inputs of a row"
                )
        for tensor, dtype in ((self.values, torch.int8), (self.scales, torch.float32), (self.least, torch.float32)):
            if tensor is not None and not (tensor.dtype == dtype and tensor.is_contiguous()):
                raise ValueError(f"blocks of weights are made of contiguous int8 and float32, not {tensor.dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        out, width = self.values.shape
        return out, width

    def dequantize(self) -> Tensor:
        """What they stand for, [out, in] float32."""
        groups = self.values.view(*self.scales.shape, BLOCK_INPUTS).float() * self.scales[..., None]
        return (groups if self.least is None else groups + self.least[..., None]).view(self.values.shape)


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A linear's weights as `Packer` laid them out. data: their bytes"""

    data: Tensor
    storage: Storage


class Packer:
    """Lays base weights [out, in] out as panels: [ceil(out / 32), in, 32], columns past `out` zero. See multiply.h.

    Where the processor multiplies bf16, weights that come in a file's blocks stay in them and, where it has no tiles,
    others lie in twelve bits if they can: less to read, the same bits of a step (tile_blocks.h, paired_blocks.h).
    dtype: the decoder's
    int8: in eight bits instead, with a float32 scale for every 32 inputs of a row, the largest of them ÷ 127
    compress: False leaves bf16 its sixteen bits
    """

    def __init__(
        self, dtype: torch.dtype, library: ctypes.CDLL | None = None, *, int8: bool = False, compress: bool = True
    ) -> None:
        self._dtype, self._bf16 = dtype, is_bf16(dtype)
        self._library = library or load_library()
        self._int8 = int8
        self._compress = compress and self._bf16 and not int8
        self._keeps_blocks = not int8 and bool(self._library.multilora_keeps_blocks(self._bf16))

    def pack(self, weight: Tensor | BlockWeights) -> PackedWeights:
        if isinstance(weight, BlockWeights):
            if self._keeps_blocks:
                storage = Storage.EIGHT_BITS if weight.least is None else Storage.FOUR_BITS
                arrays = weight.values, weight.scales, weight.least
                return self._packed(self._library.multilora_keep, arrays, weight.shape, storage)
            weight = weight.dequantize().to(self._dtype)
        if weight.dtype != self._dtype:
            raise ValueError(f"weights of {weight.dtype} for a decoder of another dtype")
        weight = weight.contiguous()
        if self._compress and (compressed := self._compressed(weight)):
            return compressed
        pack, storage = self._library.multilora_pack, Storage.AS_STORED
        if self._int8:
            pack, storage = self._library.multilora_quantise, Storage.EIGHT_BITS
        return self._packed(pack, [weight], weight.shape, storage)

    def _compressed(self, weight: Tensor) -> PackedWeights | None:
        packed = self._room(weight.shape, Storage.TWELVE_BITS)
        fits = self._library.multilora_compress(weight.data_ptr(), *weight.shape, packed.data_ptr())
        return PackedWeights(packed, Storage.TWELVE_BITS) if fits else None

    def _packed(
        self, pack: Callable[..., None], arrays: Sequence[Tensor | None], shape: Sequence[int], storage: Storage
    ) -> PackedWeights:
        packed = self._room(shape, storage)
        pack(*(0 if array is None else array.data_ptr() for array in arrays), *shape, packed.data_ptr(), self._bf16)
        return PackedWeights(packed, storage)

    def _room(self, shape: Sequence[int], storage: Storage) -> Tensor:
        size = self._library.multilora_packed_bytes(*shape, self._bf16, storage)
        return torch.empty(size, dtype=torch.uint8)


def is_bf16(dtype: torch.dtype) -> bool:
    """Raises ValueError for what is neither that nor float32."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{dtype} is not served by the compiled backend; float32 and bfloat16 are")
    return dtype == torch.bfloat16
