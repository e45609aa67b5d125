"""Expand: every row's ranks, up to the output, added in place. One launch for all slices of a linear group."""

# A kernel is Triton's language in Python's syntax: its arguments have no Python types, its constants are capitals.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lora_kernels.triton_shrink import PROGRAMS
from lora_kernels.tuning import tuned

MOST_SLICES = 3
"""q, k and v: the widest linear group. Each slice's B is a pointer argument of its own."""

BLOCK_N = 128
"""Output columns of a program: 256 bytes of each 16-bit row of B and y, and enough programs to fill a GPU at decode
(32 for an output of 4096). Reasoned, not yet measured."""

LAUNCH = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
"""Warps: each keeps 16 x 32 of the sum, 16 registers a thread. Stages: rank pages in flight; most adapters have one to
four. Fusion: said outright, because Triton's default is about to change."""


def precision_of(dtype: torch.dtype, amd: bool = torch.version.hip is not None) -> str:
    """How the float32 shrink result meets B on the tensor cores.

    TF32 holds a 16-bit B exactly, and three products hold the shrink result to almost all of float32: nothing is
    rounded before y is. One TF32 product would lose 2^-10 of it, a cast to bf16 2^-9, and a cast to fp16 its range.
    AMD's matrix cores multiply float32 as it is.
    """
    return "ieee" if dtype is torch.float32 or amd else "tf32x3"


@dataclass(frozen=True, slots=True)
class ExpandBlocks:
    """None decides the order of a sum, which runs over ranks: all may follow the batch."""

    block_n: int = BLOCK_N
    programs: int = PROGRAMS
    num_warps: int = int(LAUNCH["num_warps"])
    num_stages: int = int(LAUNCH["num_stages"])


def blocks_of(y: torch.Tensor, out_sizes: Sequence[int]) -> ExpandBlocks:
    """What to launch with for an output [rows, sum of out_sizes]: see `triton_shrink.blocks_of`."""
    return ExpandBlocks(**tuned("expand", y.device, y.dtype, out_sizes, y.shape[0]))


@triton.jit
def slice_of_block(block, b0, b1, b2, out0, out1, out2, BLOCK_N: tl.constexpr):
    """Which slice a block of output columns lies in: (its index, B, width, the block's columns within it, and the
    group's column where it begins)."""
    blocks0 = (out0 + BLOCK_N - 1) // BLOCK_N
    blocks1 = (out1 + BLOCK_N - 1) // BLOCK_N
    if block < blocks0:
        slice_index, b, out, first_block, first_column = 0, b0, out0, 0, 0
    elif block < blocks0 + blocks1:
        slice_index, b, out, first_block, first_column = 1, b1, out1, blocks0, out0
    else:
        slice_index, b, out, first_block, first_column = 2, b2, out2, blocks0 + blocks1, out0 + out1
    return slice_index, b, out, (block - first_block) * BLOCK_N + tl.arange(0, BLOCK_N), first_column


@triton.jit
def expanded(
    shrunk,
    b,
    page_table,
    position,
    in_tile,
    slice_index,
    slice_slot,
    rank,
    scale,
    column,
    out,
    max_pages,
    rank_columns,
    part_stride,
    SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[TILE_ROWS, BLOCK_N] float32: one tile's ranks, scaled, times the block's columns of one slice's B."""
    lane = tl.arange(0, PAGE_ROWS)
    in_slice = column < out
    first_part = shrunk + slice_index * SPLITS * tl.cast(part_stride, tl.int64)
    total = tl.full((TILE_ROWS, BLOCK_N), 0.0, tl.float32)
    for page in range((rank + PAGE_ROWS - 1) // PAGE_ROWS):
        rank_row = page * PAGE_ROWS + lane
        in_rank = rank_row < rank
        place = position[:, None].to(tl.int64) * rank_columns + rank_row[None, :]
        written = in_tile[:, None] & in_rank[None, :]
        ranks_of_row = tl.load(first_part + place, mask=written, other=0.0)
        for part in tl.static_range(1, SPLITS):
            part_start = part * tl.cast(part_stride, tl.int64)
            ranks_of_row += tl.load(first_part + part_start + place, mask=written, other=0.0)
        pool_page = tl.load(page_table + slice_slot * max_pages + page).to(tl.int64)
        pool_row = pool_page * PAGE_ROWS + lane
        b_block = tl.load(
            b + pool_row[:, None] * out + column[None, :], mask=in_rank[:, None] & in_slice[None, :], other=0.0
        )
        total = tl.dot(ranks_of_row * scale, b_block.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def expand_kernel(
    y,
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
    y_stride,
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
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles of rows, one after another; one block of output columns, of one slice.

    Semantics:
        for each tile, position p of it, its row i = order[p] and slot s, each column n of the block in slice t:
            y[i, n] += sum over ranks j < ranks[t, s], a page at a time, ascending:
                scale[t, s] * shrunk[t, :, p, j].sum() * B[t, s][j, n]
        The parts of `shrunk` are added in ascending order, everything in float32, and y is rounded once.
        Rows of no tile, and the columns of slices their adapter lacks, are neither read nor written.
    Shape:
        grid: (any, column blocks of all slices); program i of the first takes the tiles i, i + any, ... to the count
        y: [rows, out0 + out1 + out2], rows y_stride apart   fp32, fp16 or bf16
        b0, b1, b2: [pool rows, out]                         as y; a group with fewer slices has out = 0
        scales: [slices, slots] float32; shrunk and the rest as `shrink_kernel` has them
        PRECISION: see `precision_of`
    Cost, for a tile of adapter rank r in one slice, b bytes a value:
        bytes: r * out * b of B, once; 2 * 16 * out * b of y; 64 * r * SPLITS of `shrunk` a block, from L2.
        FLOPs: 2 * 16 * 16 * ceil(r / 16) * out.
    """
    slice_index, b, out, column, first_column = slice_of_block(tl.program_id(1), b0, b1, b2, out0, out1, out2, BLOCK_N)
    for tile in range(tl.program_id(0), tl.load(counts), tl.num_programs(0)):
        slice_slot = slice_index * slots + tl.load(tiles + tile)
        rank = tl.load(ranks + slice_slot)
        if rank > 0:
            position = tl.load(tiles + tile_capacity + tile) + tl.arange(0, TILE_ROWS)
            in_tile = position < tl.load(tiles + 2 * tile_capacity + tile)
            total = expanded(
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
            row = tl.load(order + position, mask=in_tile, other=0).to(tl.int64)
            place = row[:, None] * y_stride + first_column + column[None, :]
            inside = in_tile[:, None] & (column < out)[None, :]
            sums = tl.load(y + place, mask=inside, other=0.0).to(tl.float32) + total
            tl.store(y + place, sums.to(y.dtype.element_ty), mask=inside)
