"""The compiled decoder from Python: weights packed once, memory it reads in place, one foreign call a step."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_kernels.cpu import structs
from lora_kernels.cpu.batch import StepBatch, StepLimits
from lora_kernels.cpu.build import load_library
from lora_kernels.cpu.packing import PackedWeights, is_bf16
from lora_kernels.layout import LoraWeights, PageTable

COLUMNS = 32
"""Columns of a panel of packed weights, as in multiply.h."""

LANES = 16
"""Positions that keys are read by, as in vector.h: a block holds whole groups of them."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """A Llama-family decoder.

    dtype: of adapters and cache, and what base weights stand for, float32 or bfloat16
    """

    vocab: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One layer. linears: q, k, v, o, gate, up and down, as `Packer` returns them; norms: [hidden] float32."""

    input_norm: Tensor
    post_attention_norm: Tensor
    linears: tuple[PackedWeights, ...]


@dataclass(frozen=True, slots=True)
class CpuCache:
    """Keys and values of every layer, in blocks; as pairs of them within a block, on some levels: see attention.h.

    keys: [layers, blocks, kv_heads, head_dim, block_size]: positions side by side, so scores are sums down a column
    values: [layers, blocks, kv_heads, block_size, head_dim]
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.block_size % LANES:
            raise ValueError(f"block_size is {self.block_size}; the compiled backend takes multiples of {LANES}")

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[4]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of the rows that were asked for.

    logits: [n, vocab] float32, valid until the next step
    best: [n] int32, the first of each row's largest logits; finite: [n] bool, whether all of a row's are
    """

    logits: Tensor
    best: NDArray[np.int32]
    finite: NDArray[np.bool_]


class CpuDecoder:
    """Weights, cache and pool, and the forward pass over them. `step` is for one thread at a time."""

    def __init__(
        self,
        shape: DecoderShape,
        layers: Sequence[PackedLayer],
        *,
        norm: Tensor,
        head: PackedWeights,
        embedding: Tensor | None,
        cosines: Tensor,
        sines: Tensor,
        cache: CpuCache,
        lora: Sequence[Mapping[str, LoraWeights]],
        tables: Mapping[str, PageTable],
        threads: int,
        library: ctypes.CDLL | None = None,
    ) -> None:
        """Nothing is copied: the decoder reads every tensor where it lies and keeps it alive.

        norm: [hidden] float32; head: packed; embedding: [vocab, hidden], None where the head's weights are tied to it
        cosines, sines: [positions, head_dim / 2] float32
        lora, tables: of the slot pool; groups qkv, o, gate_up, down
        """
        self._library = library or load_library()
        self._limits = StepLimits(
            vocab=shape.vocab,
            positions=len(cosines),
            slots=next(iter(tables.values())).table.shape[1],
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
        )
        self._vocab = shape.vocab
        self._logits = np.empty((0, -(-shape.vocab // COLUMNS) * COLUMNS), np.float32)
        self._layers, self._head = layers, head
        self._read_in_place = (norm, embedding, cosines, sines, cache, lora, tables)
        model = structs.model(shape, layers, norm, head, embedding, cosines, sines, cache, lora, tables)
        handle = self._library.multilora_open(ctypes.byref(model), threads, is_bf16(shape.dtype))
        if not handle:
            raise MemoryError("the compiled backend found no memory or threads to start with")
        self._handle = handle
        self._close = weakref.finalize(self, self._library.multilora_close, handle)

    @property
    def weight_bytes(self) -> int:
        """Of the packed linears and the head, which every step reads."""
        return self._head.data.nbytes + sum(w.data.nbytes for layer in self._layers for w in layer.linears)

    def step(self, batch: StepBatch) -> StepResult:
        """Compute every row, write its keys and values, and return what was asked for.

        Raises InvalidStepError before anything is touched. The interpreter lock is free meanwhile.
        """
        batch.check(self._limits)
        sampled = len(batch.sampled_rows)
        if sampled > len(self._logits):
            self._logits = np.empty((sampled, self._logits.shape[1]), np.float32)
        best, finite = np.empty(sampled, np.int32), np.empty(sampled, np.bool_)
        call = structs.Batch(
            rows=len(batch.tokens),
            sampled=sampled,
            max_blocks=batch.block_tables.shape[1],
            tokens=batch.tokens.ctypes.data,
            positions=batch.positions.ctypes.data,
            slots=batch.slots.ctypes.data,
            sequences=batch.sequences.ctypes.data,
            block_tables=batch.block_tables.ctypes.data,
            sampled_rows=batch.sampled_rows.ctypes.data,
            logits=self._logits.ctypes.data,
            best=best.ctypes.data,
            finite=finite.ctypes.data,
        )
        if self._library.multilora_step(self._handle, ctypes.byref(call)):
            raise MemoryError(f"no memory for a step of {len(batch.tokens)} rows")
        return StepResult(torch.from_numpy(self._logits[:sampled, : self._vocab]), best, finite)
