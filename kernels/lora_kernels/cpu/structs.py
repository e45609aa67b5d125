"""The structs of memory.h, field by field, and how they are filled."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lora_kernels.layout import LoraWeights, PageTable

if TYPE_CHECKING:
    from lora_kernels.cpu.decoder import CpuCache, DecoderShape, PackedLayer
    from lora_kernels.cpu.packing import PackedWeights

_LINEARS = (("qkv", 0), ("qkv", 1), ("qkv", 2), ("o", 0), ("gate_up", 0), ("gate_up", 1), ("down", 0))
"""Group and slice of Q, K, V, O, GATE, UP, DOWN."""


class Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "a", "b", "ranks", "scales", "pages")),
        *((name, ctypes.c_int64) for name in ("out", "storage")),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_attention_norm", "keys", "values")),
        ("linears", Linear * len(_LINEARS)),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("vocab", "hidden", "inner", "heads", "kv_heads", "head_dim", "layers")),
        *((name, ctypes.c_int64) for name in ("block_size", "max_pages")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "embedding", "norm")),
        ("head", Linear),
        ("decoder", ctypes.POINTER(Layer)),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "sampled", "max_blocks")),
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "slots", "sequences", "block_tables")),
        *((name, ctypes.c_void_p) for name in ("sampled_rows", "logits", "best", "finite")),
    )


def model(
    shape: DecoderShape,
    layers: Sequence[PackedLayer],
    norm: Tensor,
    head: PackedWeights,
    embedding: Tensor | None,
    cosines: Tensor,
    sines: Tensor,
    cache: CpuCache,
    lora: Sequence[Mapping[str, LoraWeights]],
    tables: Mapping[str, PageTable],
) -> Model:
    """Addresses of everything; the caller keeps the tensors alive."""
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    outs = (q_width, kv_width, kv_width, shape.hidden, shape.inner, shape.inner, shape.hidden)
    decoder = (Layer * len(layers))()
    for index, (layer, pool) in enumerate(zip(layers, lora, strict=True)):
        decoder[index] = Layer(
            _address(layer.input_norm),
            _address(layer.post_attention_norm),
            _address(cache.keys[index]),
            _address(cache.values[index]),
            (Linear * len(_LINEARS))(
                *(
                    _linear(weight, out, pool[group], tables[group], slice_index)
                    for weight, out, (group, slice_index) in zip(layer.linears, outs, _LINEARS, strict=True)
                )
            ),
        )
    return Model(
        vocab=shape.vocab,
        hidden=shape.hidden,
        inner=shape.inner,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        layers=len(layers),
        block_size=cache.block_size,
        max_pages=next(iter(tables.values())).table.shape[2],
        eps=shape.norm_eps,
        cosines=_address(cosines),
        sines=_address(sines),
        embedding=None if embedding is None else _address(embedding),
        norm=_address(norm),
        head=Linear(weight=_address(head.data), out=shape.vocab, storage=head.storage),
        decoder=decoder,
    )


def _linear(weight: PackedWeights, out: int, lora: LoraWeights, table: PageTable, index: int) -> Linear:
    return Linear(
        weight=_address(weight.data),
        a=_address(lora.a[index]),
        b=_address(lora.b[index]),
        ranks=_address(lora.ranks[index]),
        scales=_address(lora.scales[index]),
        pages=_address(table.table[index]),
        out=out,
        storage=weight.storage,
    )


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous(), "compiled code knows no strides"
    return tensor.data_ptr()
