"""A model's tensors by their Hugging Face names, from a directory of safetensors or a .gguf file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lora_kernels.cpu import BlockWeights
from services.common.errors import FailedPrecondition
from services.inference.model.config import ModelConfig
from services.inference.model.gguf_weights import StoredWeight, read_gguf
from services.inference.parallel.shard import WHOLE, Shard


def load_weights(path: Path, config: ModelConfig, shard: Shard = WHOLE) -> dict[str, Tensor]:
    """Every tensor the decoder needs, in `config.dtype`, or a rank's part of it.

    Raises FailedPrecondition naming what is missing or wrong.
    """
    parts = expected_shapes(shard.config(config))
    return {
        name: _part(dense(weight), parts[name], shard.rank).to(config.dtype)
        for name, weight in _every_weight(path, config)
    }


def load_stored_weights(path: Path, config: ModelConfig) -> dict[str, StoredWeight]:
    """The same, those that the file has in blocks of fewer bits as they are."""
    return {
        name: weight if isinstance(weight, BlockWeights) else weight.to(config.dtype)
        for name, weight in _every_weight(path, config)
    }


def dense(weight: StoredWeight) -> Tensor:
    """What is stored, or what its blocks stand for, in float32."""
    return weight.dequantize() if isinstance(weight, BlockWeights) else weight


def _every_weight(path: Path, config: ModelConfig) -> Iterator[tuple[str, StoredWeight]]:
    expected = expected_shapes(config)
    missing = dict.fromkeys(expected)
    for name, weight in _read_safetensors(path) if path.is_dir() else read_gguf(path, config):
        if name not in expected:
            continue
        if tuple(weight.shape) != expected[name]:
            raise FailedPrecondition(
                "WEIGHT_MISSHAPEN",
                f"--model: {name} is {list(weight.shape)} where the config says {list(expected[name])}",
            )
        missing.pop(name, None)
        yield name, weight
    for name in missing:
        raise FailedPrecondition("WEIGHT_MISSING", f"--model: {path} lacks the tensor {name}")


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
