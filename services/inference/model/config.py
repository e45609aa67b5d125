"""A model's shape and arithmetic, read from a Hugging Face config: what the one decoder file is driven by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.common.errors import FailedPrecondition, Unimplemented
from services.common.gguf_config import config_from_gguf, open_gguf
from services.common.profile import ARCHITECTURES, head_dim_of, longest_context

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched. kind: default, linear or llama3 (the last four are llama3's)."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model of the Llama family.

    name: what requests and adapters know it by
    max_model_len: most tokens of prompt and answer together
    dtype_name: of ITEM_BYTES; the serving face reads this file too, and does without torch
    hf_config: the config it was read from
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tie_word_embeddings: bool
    max_model_len: int
    eos_token_ids: frozenset[int]
    dtype_name: str
    hf_config: Mapping[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * ITEM_BYTES[self.dtype_name]


def load_config(path: Path, *, name: str = "", dtype: str = "auto", max_model_len: int = 0) -> ModelConfig:
    """Read a directory's config.json or a .gguf file's metadata.

    name: '' takes the directory's or file's; dtype: auto is float32 on a CPU; max_model_len: 0 takes the model's.
    Raises FailedPrecondition (missing or contradicting) and Unimplemented (a feature not served, by name).
    """
    if path.is_dir():
        hf_config = _read_json(path / "config.json")
        eos = _read_json(path / "generation_config.json", {}).get("eos_token_id", hf_config.get("eos_token_id"))
        default_name = path.resolve().name
    else:
        hf_config = config_from_gguf(open_gguf(path))
        eos = hf_config["eos_token_id"]
        default_name = path.stem
    architecture = (hf_config.get("architectures") or ["?"])[0]
    _refuse_what_is_not_served(architecture, hf_config)
    longest = longest_context(hf_config)
    if max_model_len > longest:
        raise FailedPrecondition(
            "MODEL_TOO_SHORT",
            f"--max-model-len is {max_model_len}; this model goes to {longest}",
            field="max_model_len",
        )
    heads, hidden = hf_config["num_attention_heads"], hf_config["hidden_size"]
    rope = {**(hf_config.get("rope_parameters") or {}), **(hf_config.get("rope_scaling") or {})}
    return ModelConfig(
        name=name or default_name.lower(),
        architecture=architecture,
        vocab_size=hf_config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=hf_config["intermediate_size"],
        num_layers=hf_config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf_config.get("num_key_value_heads") or heads,
        head_dim=head_dim_of(hf_config),
        rms_norm_eps=hf_config.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta") or hf_config.get("rope_theta", 10000.0),
        rope_scaling=_rope_scaling(rope),
        tie_word_embeddings=hf_config.get("tie_word_embeddings", False),
        max_model_len=max_model_len or longest,
        eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or []),
        dtype_name="float32" if dtype == "auto" else dtype,
        hf_config=hf_config,
    )


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise Unimplemented("UNSUPPORTED_ROPE", f"model: rope scaling {kind!r} is not served", field="model")


def _refuse_what_is_not_served(architecture: str, config: Mapping[str, Any]) -> None:
    if architecture not in ARCHITECTURES:
        raise Unimplemented(
            "UNSUPPORTED_ARCHITECTURE",
            f"model: architecture {architecture!r} is not served; served are {', '.join(ARCHITECTURES)}",
            field="model",
        )
    if config.get("quantization_config"):
        raise Unimplemented("UNSUPPORTED_QUANTIZATION", "model: quantized checkpoints are not served", field="model")
    for key, served in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(key, served) != served:
            raise Unimplemented("UNSUPPORTED_MODEL", f"model: {key}={config[key]!r} is not served", field="model")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise Unimplemented("UNSUPPORTED_ROPE", "model: partial rope is not served", field="model")


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if not path.exists():
        if default is not None:
            return default
        raise FailedPrecondition(
            "MODEL_CONFIG_MISSING", f"--model: {path.parent} has no {path.name}; give a Hugging Face model directory"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise FailedPrecondition("MODEL_CONFIG_INVALID", f"--model: {path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise FailedPrecondition("MODEL_CONFIG_INVALID", f"--model: {path} is no JSON object")
    return config
