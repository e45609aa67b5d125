"""What every path is held to: LoRA as its definition reads, in float64, without pages, tiles or batching.

Tests and benchmarks compare against this and take their tolerances from the one table below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LoraSlice(NamedTuple):
    """One adapter's share of one linear: a [rank, in], b [rank, out], and the scale of their product."""

    a: Tensor
    b: Tensor
    scale: float


class Tolerance(NamedTuple):
    rtol: float
    atol: float


TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(rtol=2e-5, atol=2e-5),
    torch.float16: Tolerance(rtol=1e-3, atol=2e-4),
    torch.bfloat16: Tolerance(rtol=8e-3, atol=2e-4),
}
"""Allowed distance from the reference, for values of order one. Every path accumulates in float32 and rounds y once:
rtol is a unit in the last place of a 16-bit dtype, twice what that rounding costs; atol covers what cancels."""


def apply_lora_reference(
    y: Tensor,
    x: Tensor,
    row_slots: Sequence[int],
    adapters: Mapping[int, Sequence[LoraSlice | None]],
    out_sizes: Sequence[int],
) -> Tensor:
    """Return `y` plus every row's adapter, in float64.

    Semantics:
        for row i with slot s in adapters, for each slice t that s has:
            y[i, slice t] + scale * (x[i] @ a.T) @ b
    Shape:
        y: [rows, sum of out_sizes]   x: [rows, in]   row_slots: [rows]   adapters[s][t].a: [rank, in], .b: [rank, out]
        returns [rows, sum of out_sizes] float64
    """
    result = y.double()
    for row, slot in enumerate(row_slots):
        columns = torch.split(result[row], list(out_sizes))
        for out, lora in zip(columns, adapters.get(slot, ()), strict=slot in adapters):
            if lora is not None:
                out += lora.scale * (x[row].double() @ lora.a.double().T) @ lora.b.double()
    return result
