"""A linear of the base model, multiplied in whichever way this CPU is fast at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEN_FROM_ROWS = 6
"""Rows from which a bfloat16 product without bfloat16 instructions is taken in float32.

Measured on an AVX2 core, CPU milliseconds a decode step of SmolLM2-135M (other programs ran beside it), rows 4 / 8: as
it is 234 / 422, all widened 269 / 354. About 45 a row against 190 and 20 a row: they meet between 5 and 8.
"""
_CHUNK_ELEMENTS = 1 << 20
"""Weights widened at a time: 4 MB beside the model, where the head alone would take 100 and more."""


class Widener:
    """Takes bfloat16 products in float32. Its scratch is written over and over: pages touched anew cost more."""

    def __init__(self) -> None:
        self._scratch = torch.zeros(_CHUNK_ELEMENTS)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight.T in bfloat16, a chunk of the weight at a time. Shape: x [rows, in], weight [out, in]."""
        wide, y = x.float(), x.new_empty(len(x), len(weight))
        chunk = max(1, _CHUNK_ELEMENTS // weight.shape[1])
        for part, out in zip(torch.split(weight, chunk), torch.split(y, chunk, dim=1), strict=True):
            out.copy_(wide @ self._scratch[: part.numel()].view(part.shape).copy_(part).T)
        return y


class Linear:
    """y = x @ weight.T, accumulated in float32 and rounded to the weight's dtype once.

    weight: [out, in]
    widener: shared by a model's linears; None where the CPU multiplies the weight's dtype itself
    """

    def __init__(self, weight: Tensor, widener: Widener | None) -> None:
        self._weight = weight
        self._widener = widener

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: x [rows, in] in the weight's dtype; returns [rows, out]."""
        if self._widener is not None and len(x) >= WIDEN_FROM_ROWS:
            return self._widener.product(x, self._weight)
        return F.linear(x, self._weight)


def widener_for(dtype: torch.dtype) -> Widener | None:
    """One for bfloat16 on a CPU without instructions for it."""
    return Widener() if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
