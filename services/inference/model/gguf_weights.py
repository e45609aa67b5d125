"""The tensors of a .gguf file by their Hugging Face names; blocks of four and eight bits as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_kernels.cpu import BlockWeights
from services.common.errors import Unimplemented
from services.common.gguf_config import open_gguf
from services.inference.model.config import ModelConfig

if TYPE_CHECKING:
    from gguf import ReaderTensor

StoredWeight: TypeAlias = Tensor | BlockWeights

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def read_gguf(path: Path, config: ModelConfig) -> Iterator[tuple[str, StoredWeight]]:
    """Raises Unimplemented for a type that cannot be read."""
    for tensor in open_gguf(path).tensors:
        name, weight = str(tensor.name).removesuffix(".weight"), _weight(tensor)
        if name.startswith("blk."):
            _, layer, part = name.split(".", 2)
            if part in ("attn_q", "attn_k"):
                weight = _unpermuted(weight, config.num_heads if part == "attn_q" else config.num_kv_heads)
            yield f"model.layers.{layer}.{_NAMES.get(part, part)}.weight", weight
        else:
            yield f"{_TOP.get(name, name)}.weight", weight


def _weight(tensor: ReaderTensor) -> StoredWeight:
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import dequantize

    if tensor.tensor_type == Type.Q4_0:
        (scales,), values = _blocks(tensor.data, scales=1, size=18)
        return BlockWeights(_nibbles(values), scales, -8 * scales)
    if tensor.tensor_type == Type.Q4_1:
        (scales, least), values = _blocks(tensor.data, scales=2, size=20)
        return BlockWeights(_nibbles(values), scales, least)
    if tensor.tensor_type == Type.Q8_0:
        (scales,), values = _blocks(tensor.data, scales=1, size=34)
        return BlockWeights(_rows(values.view(np.int8)), scales)
    try:
        return torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W"))
    except NotImplementedError as error:
        raise Unimplemented(
            "UNSUPPORTED_QUANTIZATION", f"--model: GGUF type {tensor.tensor_type.name} of {tensor.name} is not served"
        ) from error


def _blocks(data: NDArray[np.uint8], *, scales: int, size: int) -> tuple[list[Tensor], NDArray[np.uint8]]:
    """Of rows of blocks of `size` bytes that begin with so many float16: these, [rows, blocks] each, and the rest."""
    blocks = data.reshape(len(data), -1, size)
    halves = blocks[..., : 2 * scales].copy().view(np.float16).astype(np.float32)
    return [torch.from_numpy(halves[..., i].copy()) for i in range(scales)], blocks[..., 2 * scales :].copy()


def _nibbles(values: NDArray[np.uint8]) -> Tensor:
    """Of a block's 32 values the first sixteen are in the lower halves of its bytes, the others in the upper."""
    return _rows(np.concatenate((values & 15, values >> 4), axis=-1).view(np.int8))


def _rows(values: NDArray[np.int8]) -> Tensor:
    return torch.from_numpy(values.reshape(len(values), -1))


def _unpermuted(weight: StoredWeight, heads: int) -> StoredWeight:
    """Rows of q or k from GGUF's order (a rotary pair side by side) to Hugging Face's (its halves apart)."""
    if isinstance(weight, Tensor):
        return _unpermuted_rows(weight, heads)
    least = None if weight.least is None else _unpermuted_rows(weight.least, heads)
    return BlockWeights(_unpermuted_rows(weight.values, heads), _unpermuted_rows(weight.scales, heads), least)


def _unpermuted_rows(rows: Tensor, heads: int) -> Tensor:
    count, width = rows.shape
    return rows.view(heads, count // heads // 2, 2, width).transpose(1, 2).reshape(count, width)
