"""Small adapters as PEFT saves them, made by hand so that a case can break any byte of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from multilora.adapter_store.v1 import admin_pb2

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_MODEL = "tiny-llama"
HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, LAYERS, VOCAB = 16, 4, 2, 24, 2, 32
MAX_RANK = 8
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, 8),
    "self_attn.v_proj": (HIDDEN, 8),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
# What PEFT 0.21 writes for a plain LoRA.
PEFT_CONFIG: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": BASE_MODEL,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "down_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


@dataclass
class Tensor:
    """A tensor's bytes under a safetensors dtype."""

    dtype: str
    shape: list[int]
    data: bytes

    @classmethod
    def of(cls, values: npt.NDArray[np.float32], dtype: str = "F32") -> Tensor:
        if dtype == "BF16":
            data = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            data = values.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1"}[dtype]).tobytes()
        return cls(dtype, list(values.shape), data)


@dataclass
class Adapter:
    """A PEFT adapter that a case may change before it is sent."""

    config: dict[str, Any] = field(default_factory=lambda: deepcopy(PEFT_CONFIG))
    tensors: dict[str, Tensor] = field(default_factory=dict)
    raw_config: bytes | None = None
    raw_weights: bytes | None = None

    def files(self) -> dict[str, bytes]:
        config = json.dumps(self.config, indent=2).encode() if self.raw_config is None else self.raw_config
        weights = safetensors_bytes(self.tensors) if self.raw_weights is None else self.raw_weights
        return {CONFIG_FILE: config, WEIGHTS_FILE: weights}

    def save(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (directory / name).write_bytes(data)
        return directory


def key(layer: int, module: str, side: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"


def make_adapter(
    *,
    seed: int = 0,
    rank: int = 4,
    modules: tuple[str, ...] = ("self_attn.q_proj", "mlp.down_proj"),
    layers: tuple[int, ...] = (0, 1),
    dtype: str = "F32",
    **config: Any,
) -> Adapter:
    """A valid adapter of the tiny base model, unless the arguments make it otherwise."""
    adapter = Adapter()
    adapter.config.update({"r": rank, "target_modules": [module.split(".")[-1] for module in modules]} | config)
    for layer in layers:
        for module in modules:
            add_module(adapter, layer, module, rank=rank, dtype=dtype, seed=seed)
    return adapter


def add_module(adapter: Adapter, layer: int, module: str, *, rank: int = 4, dtype: str = "F32", seed: int = 0) -> None:
    """Add A and B of one module, or put others in their place."""
    random = np.random.default_rng([seed, layer, *module.encode()])
    in_features, out_features = SHAPES[module]
    for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
        values = random.standard_normal(shape).astype(np.float32)
        adapter.tensors[key(layer, module, side)] = Tensor.of(values, dtype)


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + len(tensor.data)]}
        end += len(tensor.data)
    return with_header(json.dumps(header).encode(), b"".join(tensor.data for tensor in tensors.values()))


def with_header(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


def upload_header(adapter: str, base_model: str = BASE_MODEL, **fields: bool) -> admin_pb2.RegisterVersionRequest:
    header = admin_pb2.RegisterVersionHeader(adapter=adapter, base_model=base_model, **fields)
    return admin_pb2.RegisterVersionRequest(header=header)


def chunk(file: str, data: bytes) -> admin_pb2.RegisterVersionRequest:
    return admin_pb2.RegisterVersionRequest(chunk=admin_pb2.FileChunk(file=file, data=data))


def requests(
    name: str, adapter: Adapter, *, base_model: str = BASE_MODEL, chunk_bytes: int = 1000, **fields: bool
) -> Iterator[admin_pb2.RegisterVersionRequest]:
    """The messages of a whole upload."""
    yield upload_header(name, base_model, **fields)
    for file, data in adapter.files().items():
        for start in range(0, len(data) or 1, chunk_bytes):
            yield chunk(file, data[start : start + chunk_bytes])
