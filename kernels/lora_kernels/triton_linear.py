"""The base linear and its adapters in one launch, for decode: the rows' own product, and expand on top of it."""

# A kernel is Triton's language in Python's syntax: its arguments have no Python types, its constants are capitals.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels.triton_expand import expanded, slice_of_block

BLOCK_N = 32
"""Output columns of a program: 192 of them for a qkv of 6144, more than an H200 has multiprocessors."""

BLOCK_COLUMNS = {torch.float32: 32, torch.float16: 128, torch.bfloat16: 128}
"""Input columns a step multiplies, two cache lines of a row of 16-bit weights. Reasoned, not yet measured."""

LAUNCH = {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": True}
"""Stages: 12 KiB of x and weights each in 16 bits; a program must keep many loads in flight to use the bandwidth."""


@triton.jit
def linear_expand_kernel(
    y,
    x,
    weight,
    shrunk,
    b0,
    b1,
    b2,
    order,
    tiles,
    counts,
    page_table,
    ranks,
    scales,
    rows,
    width,
    x_stride,
    y_stride,
    weight_stride,
    out0,
    out1,
    out2,
    slots,
    max_pages,
    rank_columns,
    part_stride,
    tile_capacity,
    SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """TILE_ROWS neighbours in the order of slots; one block of output columns, of one slice.

    Semantics:
        for each position p of the block, its row i = order[p], each column n of the block in slice t:
            y[i, n] = sum over k, ascending: x[i, k] * weight[n, k]
                      + what `expand_kernel` adds, where the row has a slot s that has the slice
        Everything in float32, rounded once: `expand_kernel` after a base linear rounds twice.
    Shape:
        grid: (ceil(rows / TILE_ROWS), column blocks of all slices); programs that share weights are neighbours
        y: [rows, out0 + out1 + out2]   x: [rows, width]   weight: [out0 + out1 + out2, width]
        the rest as `expand_kernel` has them
    Cost: the linear's and expand's bytes, less a y read and written; weights come from L2 for rows past the first 16.
    """
    slice_index, b, out, column, first_column = slice_of_block(tl.program_id(1), b0, b1, b2, out0, out1, out2, BLOCK_N)
    first = tl.program_id(0) * TILE_ROWS
    position = first + tl.arange(0, TILE_ROWS)
    in_rows = position < rows
    row = tl.load(order + position, mask=in_rows, other=0).to(tl.int64)
    in_slice = column < out
    output = (first_column + column).to(tl.int64)

    total = tl.full((TILE_ROWS, BLOCK_N), 0.0, tl.float32)
    for step in range((width + BLOCK_K - 1) // BLOCK_K):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        in_width = k < width
        x_block = tl.load(
            x + row[:, None] * x_stride + k[None, :], mask=in_rows[:, None] & in_width[None, :], other=0.0
        )
        w_block = tl.load(
            weight + output[None, :] * weight_stride + k[:, None],
            mask=in_slice[None, :] & in_width[:, None],
            other=0.0,
        )
        total = tl.dot(x_block, w_block, total, input_precision="ieee")

    for tile in range(tl.load(counts)):
        start = tl.load(tiles + tile_capacity + tile)
        end = tl.load(tiles + 2 * tile_capacity + tile)
        slice_slot = slice_index * slots + tl.load(tiles + tile)
        rank = tl.load(ranks + slice_slot)
        if (start < first + TILE_ROWS) & (end > first) & (rank > 0):
            in_tile = (position >= start) & (position < end)
            lora = expanded(
                shrunk,
                b,
                page_table,
                position,
                in_tile,
                slice_index,
                slice_slot,
                rank,
                tl.load(scales + slice_slot),
                column,
                out,
                max_pages,
                rank_columns,
                part_stride,
                SPLITS,
                TILE_ROWS,
                PAGE_ROWS,
                BLOCK_N,
                PRECISION,
            )
            # selected, not added: a zero row times a neighbour's inf would be NaN
            total = tl.where(in_tile[:, None], total + lora, total)

    inside = in_rows[:, None] & in_slice[None, :]
    tl.store(y + row[:, None] * y_stride + output[None, :], total.to(y.dtype.element_ty), mask=inside)
