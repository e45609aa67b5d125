"""A linear of the base model, multiplied in whichever way this CPU is fast at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEN_FROM_ROWS = 4
"""Rows from which a bfloat16 product without bfloat16 instructions is taken in float32.

Measured on two AVX2 cores, weight [960, 576], µs for 1 / 8 / 64 / 512 rows: as it is 90 / 585 / 4,577 / 32,017,
widened first 189 / 364 / 697 / 4,125. About 70 a row against 160 and 25 a row: they meet at 3 to 4.
"""
_CHUNK_ELEMENTS = 1 << 21
"""Weights widened at a time, so that the copy takes 8 MB and not the head's 100 and more."""


class Linear:
    """y = x @ weight.T, accumulated in float32 and rounded to the weight's dtype once.

    Shape: weight [out, in]; x [rows, in] in the weight's dtype; the answer [rows, out]
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        native = weight.dtype is not torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self._widens = not native

    def __call__(self, x: Tensor) -> Tensor:
        if self._widens and len(x) >= WIDEN_FROM_ROWS:
            return widened_product(x, self._weight)
        return F.linear(x, self._weight)


def widened_product(x: Tensor, weight: Tensor) -> Tensor:
    """The product taken in float32, a chunk of the weight at a time; kept nowhere."""
    wide, y = x.float(), x.new_empty(len(x), len(weight))
    chunk = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), chunk):
        y[:, start : start + chunk] = wide @ weight[start : start + chunk].float().T
    return y
