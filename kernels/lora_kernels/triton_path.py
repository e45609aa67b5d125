"""The Triton path: a shrink and an expand per linear group, straight from the rank pages.

A row's result is bitwise the same in every batch: tiles, blocks and the parts of a sum are fixed by the layer and by
the row's own rank, sums run in one order, and nothing is added atomically. Rows of the base model are in no tile.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lora_kernels import triton_expand, triton_shrink
from lora_kernels.layout import PAGE_ROWS, LoraBatch, LoraWeights
from lora_kernels.row_tiles import TILE_ROWS


def apply_lora_triton(y: Tensor, x: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """Add each row's adapter to `y` in place, in two launches and without waiting for the device.

    Semantics:
        for row i with slot s >= 0, for each slice t that s has:
            y[i, slice t] += (scale[t, s] * x[i] @ A[t, s].T) @ B[t, s]      accumulated in float32
    Shape:
        y: [rows, sum of out]   x: [rows, in], both of the pool's dtype; a row's values lie side by side
    """
    assert x.dtype == y.dtype == weights.a.dtype, "x, y and the pool share one dtype"
    assert x.stride(1) == y.stride(1) == 1, "kernels step through a row one value at a time"
    assert weights.slices <= triton_expand.MOST_SLICES
    most_pages = batch.active.most_pages[weights.group]
    if not x.shape[0] or not most_pages:
        return

    splits = triton_shrink.splits_of(x.shape[1])
    # Never filled: expand reads only what shrink wrote.
    shrunk = torch.empty(
        weights.slices, splits, x.shape[0], most_pages * PAGE_ROWS, dtype=torch.float32, device=x.device
    )
    shrink(shrunk, x, weights, batch)
    expand(y, shrunk, weights, batch)


def shrink(shrunk: Tensor, x: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """Launch `shrink_kernel`.   shrunk: [slices, splits, rows, most pages * PAGE_ROWS] float32"""
    tiles = batch.tiles
    table = batch.active.tables[weights.group].table
    splits, rank_columns = shrunk.shape[1], shrunk.shape[3]
    grid = (tiles.slots.numel(), rank_columns // PAGE_ROWS, weights.slices * splits)
    triton_shrink.shrink_kernel[grid](
        x,
        weights.a,
        shrunk,
        tiles.order,
        tiles.slots,
        tiles.starts,
        tiles.ends,
        table,
        weights.ranks,
        x.shape[1],
        x.stride(0),
        weights.a.shape[1],
        table.shape[1],
        table.shape[2],
        rank_columns,
        shrunk.stride(1),
        SPLITS=splits,
        TILE_ROWS=TILE_ROWS,
        PAGE_ROWS=PAGE_ROWS,
        BLOCK_K=triton_shrink.block_k_of(x.dtype),
        **triton_shrink.LAUNCH,
    )


def expand(y: Tensor, shrunk: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """Launch `expand_kernel`.   shrunk: what `shrink` wrote"""
    tiles = batch.tiles
    table = batch.active.tables[weights.group].table
    absent = triton_expand.MOST_SLICES - weights.slices
    out_sizes = [b.shape[1] for b in weights.b]
    blocks = sum(triton.cdiv(out, triton_expand.BLOCK_N) for out in out_sizes)
    triton_expand.expand_kernel[(tiles.slots.numel(), blocks)](
        y,
        shrunk,
        *weights.b,
        *[weights.b[0]] * absent,
        tiles.order,
        tiles.slots,
        tiles.starts,
        tiles.ends,
        table,
        weights.ranks,
        weights.scales,
        y.stride(0),
        *out_sizes,
        *[0] * absent,
        table.shape[1],
        table.shape[2],
        shrunk.shape[3],
        shrunk.stride(1),
        SPLITS=shrunk.shape[1],
        TILE_ROWS=TILE_ROWS,
        PAGE_ROWS=PAGE_ROWS,
        BLOCK_N=triton_expand.BLOCK_N,
        PRECISION=triton_expand.precision_of(y.dtype),
        **triton_expand.LAUNCH,
    )
