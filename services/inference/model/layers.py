"""The pieces a decoder layer is made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.inference.model.config import ModelConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, the norm taken in float32 as Llama does. Shape: x [rows, hidden], weight [hidden]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


class RotaryEmbedding:
    """Rotary positions in the halves-apart layout; cos and sin of every position, [max_model_len, head_dim]."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        frequencies = inverse_frequencies(config)
        angles = torch.outer(torch.arange(config.max_model_len).float(), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        self._cos = angles.cos().to(device, config.dtype)
        self._sin = angles.sin().to(device, config.dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for a batch: each [rows, 1, head_dim]."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to q or k [rows, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotary frequencies [head_dim / 2], stretched as the config says."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        blend = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blend = blend.clamp(0, 1)
        return frequencies * blend + frequencies / scaling.factor * (1 - blend)
    return frequencies
