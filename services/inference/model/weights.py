"""A model's tensors by their Hugging Face names, from a directory of safetensors or a .gguf file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from services.common.errors import FailedPrecondition, Unimplemented
from services.common.gguf_config import open_gguf
from services.inference.model.config import ModelConfig
from services.inference.parallel.shard import WHOLE, Shard


def load_weights(path: Path, config: ModelConfig, shard: Shard = WHOLE) -> dict[str, Tensor]:
    """Every tensor the decoder needs, in `config.dtype`, or a rank's part of it.

    Raises FailedPrecondition naming what is missing or wrong.
    """
    tensors = _read_safetensors(path) if path.is_dir() else _read_gguf(path, config)
    expected, parts = expected_shapes(config), expected_shapes(shard.config(config))
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in expected:
            continue
        if tuple(tensor.shape) != expected[name]:
            raise FailedPrecondition(
                "WEIGHT_MISSHAPEN",
                f"--model: {name} is {list(tensor.shape)} where the config says {list(expected[name])}",
            )
        weights[name] = _part(tensor, parts[name], shard.rank).to(config.dtype)
    for name in expected:
        if name not in weights:
            raise FailedPrecondition("WEIGHT_MISSING", f"--model: {path} lacks the tensor {name}")
    return {name: weights[name] for name in expected}


def _part(tensor: Tensor, shape: tuple[int, ...], rank: int) -> Tensor:
    """The rank's part of a tensor that is cut along the dimension in which `shape` is narrower."""
    for dimension, width in enumerate(shape):
        if tensor.shape[dimension] != width:
            return tensor.narrow(dimension, rank * width, width).contiguous()
    return tensor


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the decoder."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (q_width, hidden),
            prefix + "self_attn.k_proj.weight": (kv_width, hidden),
            prefix + "self_attn.v_proj.weight": (kv_width, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, q_width),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.exists():
            raise FailedPrecondition("WEIGHTS_MISSING", f"--model: {file} does not exist; is the download complete?")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, tensors.get_tensor(name)


_GGUF_NAMES = {
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
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _read_gguf(path: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    for tensor in open_gguf(path).tensors:
        try:
            values = torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W"))
        except NotImplementedError as error:
            raise Unimplemented(
                "UNSUPPORTED_QUANTIZATION",
                f"--model: GGUF type {tensor.tensor_type.name} of {tensor.name} is not served",
            ) from error
        name = str(tensor.name).removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, part = name.split(".", 2)
            if part in ("attn_q", "attn_k"):
                values = _unpermute(values, config.num_heads if part == "attn_q" else config.num_kv_heads)
            yield f"model.layers.{layer}.{_GGUF_NAMES.get(part, part)}.weight", values
        else:
            yield f"{_GGUF_TOP.get(name, name)}.weight", values


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from GGUF's order (a rotary pair side by side) to Hugging Face's (its halves apart)."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
