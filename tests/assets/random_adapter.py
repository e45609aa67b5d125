"""A random LoRA adapter on disk, in PEFT's format but written without PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Every field that LoraConfig of PEFT 0.21 writes, at its default.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
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
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear inside the layers of a Llama config, by full module name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q_rows, kv_rows = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    shapes = {
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    }


def is_target(name: str, target_modules: list[str] | str, layers: list[int] | None) -> bool:
    """Whether PEFT would adapt this module: a string is a full-match regex, a list holds whole dotted suffixes."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    if not any(name == target or name.endswith(f".{target}") for target in target_modules):
        return False
    return layers is None or int(name.split(".")[2]) in layers


def pattern_value(pattern: dict[str, int] | None, name: str, default: int) -> int:
    """The value of the first pattern key that matches the end of the name at a dot, as PEFT looks it up."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def make_random_adapter(
    path: Path,
    model_dir_or_hf_config: Path | dict[str, Any],
    *,
    r: int = 8,
    lora_alpha: int = 16,
    target_modules: list[str] | str = r".*\.(q|v)_proj",
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, int] | None = None,
    layers_to_transform: list[int] | None = None,
    seed: int = 0,
    std: float = 0.1,
    dtype: str = "float32",
    base_model_name_or_path: str = "tiny-llama",
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors into `path`, and return `path`.

    A is [rank, in] and B is [out, rank], both normal with deviation `std`: unlike a fresh PEFT adapter, B is not
    zero, so the adapter changes what the model says.
    """
    if isinstance(target_modules, str) and layers_to_transform is not None:
        raise ValueError("PEFT refuses layers_to_transform when target_modules is a regex")
    config = model_dir_or_hf_config
    if isinstance(config, Path):
        config = json.loads((config / "config.json").read_text(encoding="utf-8"))
    # PEFT sorts the keys when it saves, and the first match wins when it loads; so do both here.
    rank_pattern = dict(sorted((rank_pattern or {}).items()))
    alpha_pattern = dict(sorted((alpha_pattern or {}).items()))
    rng = np.random.default_rng(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in linear_shapes(config).items():
        if is_target(name, target_modules, layers_to_transform):
            rank = pattern_value(rank_pattern, name, r)
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = torch.from_numpy(rng.normal(0.0, std, shape).astype(np.float32))
                weights[f"base_model.model.{name}.lora_{side}.weight"] = values.to(DTYPES[dtype])
    if not weights:
        raise ValueError(f"target_modules {target_modules!r} matches no linear of the model")
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
    written = DEFAULTS | {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base_model_name_or_path,
        "layers_to_transform": layers_to_transform,
        "lora_alpha": lora_alpha,
        "r": r,
        "rank_pattern": rank_pattern,
        "target_modules": target_modules,
        "use_rslora": use_rslora,
    }
    (path / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return path
