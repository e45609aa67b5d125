"""Where LoRA meets the decoder: which linears read the same input, and one call after each such group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lora_kernels import LoraBatch, LoraWeights, apply_lora
from services.inference.model.config import ModelConfig

LINEAR_GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linears that share their input, in the order in which their outputs lie side by side."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Widths of a linear group: its one input, and the output of each slice."""

    in_features: int
    out_features: tuple[int, ...]


def group_shapes(config: ModelConfig) -> dict[str, GroupShape]:
    """The shapes of `LINEAR_GROUPS` in one layer of this model."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "qkv": GroupShape(hidden, (q_width, kv_width, kv_width)),
        "o": GroupShape(q_width, (hidden,)),
        "gate_up": GroupShape(hidden, (inner, inner)),
        "down": GroupShape(inner, (hidden,)),
    }


class LoraLayer:
    """One layer's adapters, as the decoder applies them: after a group's base linear, onto its output."""

    def __init__(self, weights: Mapping[str, LoraWeights], batch: LoraBatch) -> None:
        self._weights = weights
        self._batch = batch

    def add(self, group: str, y: Tensor, x: Tensor) -> Tensor:
        """Add every row's adapter to `y` in place, and return it."""
        apply_lora(y, x, self._weights[group], self._batch)
        return y
