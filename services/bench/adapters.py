"""Adapters to register, made by hand: valid against the base model below, of any size, each with its own digest."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BASE_MODEL = "bench"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_RANK = 16
_HIDDEN, _INTERMEDIATE, _KV = 4096, 14336, 1024
_SHAPES = {  # of Llama-3.1-8B: (in, out)
    "self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "self_attn.k_proj": (_HIDDEN, _KV),
    "self_attn.v_proj": (_HIDDEN, _KV),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN),
    "mlp.gate_proj": (_HIDDEN, _INTERMEDIATE),
    "mlp.up_proj": (_HIDDEN, _INTERMEDIATE),
    "mlp.down_proj": (_INTERMEDIATE, _HIDDEN),
}
_LAYER_BYTES = 2 * _RANK * sum(map(sum, _SHAPES.values()))
_MAX_LAYERS = 64


@dataclass(slots=True)
class Files:
    """The two files of an adapter. `variant` changes one value, and so every digest."""

    config: bytes
    weights: bytearray
    _data: int  # where the tensors begin

    @property
    def size(self) -> int:
        return len(self.config) + len(self.weights)

    def variant(self, number: int) -> None:
        struct.pack_into("<HH", self.weights, self._data, 0x3C00 + number % 97, 0x3C00 + number // 97)

    def save(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_bytes(self.config)
        (directory / WEIGHTS_FILE).write_bytes(self.weights)
        return directory


def base_config() -> str:
    """Of the base model, as Hugging Face names its fields."""
    return json.dumps(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": _HIDDEN,
            "intermediate_size": _INTERMEDIATE,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": _MAX_LAYERS,
            "vocab_size": 128256,
        }
    )


def linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear in the layers of a Llama config in Hugging Face's fields, by `LAYER.NAME`."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    of_layer = {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    layers = range(config["num_hidden_layers"])
    return {f"{layer}.{name}": shape for layer in layers for name, shape in of_layer.items()}


def make_adapter(megabytes: float) -> Files:
    """All linears in bf16 at rank 16, in as many layers as come nearest to the size; less than a layer: one k_proj."""
    layers = min(round(megabytes * 1e6 / _LAYER_BYTES), _MAX_LAYERS)
    shapes = {
        f"{layer}.{name}": shape
        for layer in range(layers or 1)
        for name, shape in (_SHAPES if layers else {"self_attn.k_proj": (_HIDDEN, _KV)}).items()
    }
    return random_adapter(shapes, rank=_RANK, base_model=BASE_MODEL)


def random_adapter(
    shapes: Mapping[str, tuple[int, int]], *, rank: int, base_model: str, seed: int = 0, deviation: float = 1.0
) -> Files:
    """bf16 A and B with normal values for each linear of `shapes`, (in, out) by `LAYER.NAME`; alpha is twice the rank.

    A deviation of a few hundredths changes what a model says, and leaves its values finite.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for module, (in_features, out_features) in shapes.items():
        for side, shape in (("A", [rank, in_features]), ("B", [out_features, rank])):
            size = 2 * shape[0] * shape[1]
            name = f"base_model.model.model.layers.{module}.lora_{side}.weight"
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    values = np.random.default_rng(seed).standard_normal(end // 2, dtype=np.float32) * np.float32(deviation)
    text = json.dumps(header).encode()
    weights = bytearray(struct.pack("<Q", len(text)) + text)
    begin = len(weights)
    weights += (values.view("<u4") >> 16).astype("<u2").tobytes()
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "lora_alpha": 2 * rank,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({module.split(".")[-1] for module in shapes}),
        "task_type": "CAUSAL_LM",
    }
    return Files(json.dumps(config).encode(), weights, begin)
