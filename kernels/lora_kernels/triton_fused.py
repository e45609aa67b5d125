"""Fewer launches for a linear group: ways to compute what a base linear and `apply_lora_triton` do, by hand of a caller
that measured them. None is the default; `kernels/README.md` has the table of what each should save, and did.

    norm, linear, shrink, expand          4 launches, the default
    norm+shrink, linear, expand           3: `norm_shrink` or `silu_shrink`, the linear, `triton_path.expand`
    norm+shrink, linear+expand            2, as many as without LoRA: then `linear_expand`
    norm, linear beside shrink, expand    4, of which two at a time: `linear_beside_shrink`
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from lora_kernels import triton_linear
from lora_kernels.layout import PAGE_ROWS, LoraBatch, LoraWeights
from lora_kernels.triton_path import (
    check_launch,
    check_shape,
    check_values,
    column_blocks,
    empty_shrunk,
    expand,
    expand_arguments,
    shrink,
    work_of,
)
from lora_kernels.triton_shrink import Produce
from lora_kernels.work_list import TILE_ROWS, check_rows


def norm_shrink(x: Tensor, gain: Tensor, eps: float, weights: LoraWeights, batch: LoraBatch) -> tuple[Tensor, Tensor]:
    """RMSNorm and shrink in one launch: (the linear's input [rows, in], shrunk as `triton_path.expand` takes it).

    Semantics:
        input = (x / sqrt(mean(x ** 2) + eps)) rounded, times gain
    Shape:
        x: [rows, in]   gain: [in]
    Raises a `LoraInputError` before the launch.
    """
    check_values(weights, x=x, gain=gain)
    check_shape("x", x, x.shape[0], weights.a.shape[2])
    check_shape("gain", gain, weights.a.shape[2])
    return _produce(x, Produce("norm", torch.empty_like(x), gain, eps), weights, batch)


def silu_shrink(gate_up: Tensor, weights: LoraWeights, batch: LoraBatch) -> tuple[Tensor, Tensor]:
    """silu(gate) rounded, times up, and shrink, in one launch; returns as `norm_shrink` does.

    Shape:
        gate_up: [rows, 2 * in], gate first
    Raises a `LoraInputError` before the launch.
    """
    check_values(weights, gate_up=gate_up)
    width = weights.a.shape[2]
    check_shape("gate_up", gate_up, gate_up.shape[0], 2 * width)
    return _produce(gate_up, Produce("silu", gate_up.new_empty(gate_up.shape[0], width)), weights, batch)


def _produce(x: Tensor, produce: Produce, weights: LoraWeights, batch: LoraBatch) -> tuple[Tensor, Tensor]:
    work = work_of(batch)
    check_rows(work, x.shape[0])
    shrunk = empty_shrunk(produce.into, weights, work)
    if x.shape[0]:
        shrink(shrunk, x, weights, batch, produce=produce)
    return produce.into, shrunk


def linear_expand(x: Tensor, weight: Tensor, shrunk: Tensor, weights: LoraWeights, batch: LoraBatch) -> Tensor:
    """x @ weight.T and every row's adapter in one launch: y [rows, sum of out], rounded once.

    A row's bits are its own here too, though not those of a linear and `apply_lora`, which round in between.

    Shape:
        x: [rows, in]   weight: [sum of out, in]   shrunk: of the same batch
    Raises a `LoraInputError` before the launch.
    """
    out_sizes = [b.shape[1] for b in weights.b]
    y = x.new_empty(x.shape[0], sum(out_sizes))
    check_launch(y, x, weights)
    check_values(weights, weight=weight)
    check_shape("weight", weight, sum(out_sizes), x.shape[1])
    work = work_of(batch)
    check_rows(work, x.shape[0])
    check_shape("shrunk", shrunk, weights.slices, shrunk.shape[1], x.shape[0], work.max_pages * PAGE_ROWS)
    if not x.shape[0]:
        return y
    triton_linear.linear_expand_kernel[
        triton.cdiv(x.shape[0], TILE_ROWS), column_blocks(weights, triton_linear.BLOCK_N)
    ](
        y,
        x,
        weight,
        **expand_arguments(y, shrunk, weights, batch),
        rows=x.shape[0],
        width=x.shape[1],
        x_stride=x.stride(0),
        weight_stride=weight.stride(0),
        BLOCK_K=triton_linear.BLOCK_COLUMNS[x.dtype],
        BLOCK_N=triton_linear.BLOCK_N,
        **triton_linear.LAUNCH,
    )
    return y


def linear_beside_shrink(
    linear: Callable[[Tensor], Tensor], x: Tensor, weights: LoraWeights, batch: LoraBatch, side: torch.cuda.Stream
) -> Tensor:
    """linear(x) with every row's adapter added; shrink runs on `side` meanwhile. A CUDA graph captures the fork.

    side: a stream of the caller's, one for all layers
    Raises a `LoraInputError` before the launch of shrink, or of expand.
    """
    check_values(weights, x=x)
    check_shape("x", x, x.shape[0], weights.a.shape[2])
    work = work_of(batch)
    check_rows(work, x.shape[0])
    shrunk = empty_shrunk(x, weights, work)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        shrink(shrunk, x, weights, batch)
    y = linear(x)
    torch.cuda.current_stream().wait_stream(side)
    check_launch(y, x, weights)
    expand(y, shrunk, weights, batch)
    return y
