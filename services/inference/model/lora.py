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


def group_shapes(config: ModelConfig, parts: int = 1) -> dict[str, GroupShape]:
    """The shapes of `LINEAR_GROUPS` in one layer of this model; parts: see `Shard.adapter_parts`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "qkv": GroupShape(hidden // parts, (q_width, kv_width, kv_width)),
        "o": GroupShape(q_width, (hidden // parts,)),
        "gate_up": GroupShape(hidden // parts, (inner, inner)),
        "down": GroupShape(inner, (hidden // parts,)),
    }


class LoraLayer:
    """One layer's adapters, as the decoder applies them: after a group's base linear, onto its output."""

    def __init__(self, weights: Mapping[str, LoraWeights], batch: LoraBatch, rank: int = 0) -> None:
        self._weights = weights
        self._batch = batch
        self._rank = rank

    def add(self, group: str, y: Tensor, x: Tensor) -> Tensor:
        """Add every row's adapter to `y` in place, and return it."""
        weights = self._weights[group]
        apply_lora(
            columns_of(y, sum(b.shape[1] for b in weights.b), self._rank),
            columns_of(x, weights.a.shape[2], self._rank),
            weights,
            self._batch,
        )
        return y


def columns_of(whole: Tensor, width: int, rank: int) -> Tensor:
    """The columns that a rank has `width` of: all, where the tensor has no more. A view."""
    return whole if whole.shape[1] == width else whole.narrow(1, rank * width, width)
