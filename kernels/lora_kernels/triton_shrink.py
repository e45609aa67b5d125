"""Shrink: every row's input, down to its own adapter's rank. One launch for all slices of a linear group."""

# A kernel is Triton's language in Python's syntax: its arguments have no Python types, its constants are capitals.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lora_kernels.tuning import tuned

BLOCK_COLUMNS = {torch.float32: 32, torch.float16: 128, torch.bfloat16: 128}
"""Input columns a step multiplies: two cache lines of a row of 16-bit values, 8 KiB of x and A together; one line of
float32, which spills registers on sm_80 at twice that. Otherwise reasoned, not yet measured."""

SPLIT_COLUMNS = 1024
MOST_SPLITS = 4
"""A decode step with one adapter has a single tile, too few programs to pull A at full bandwidth; so its columns are
summed in up to four parts. A function of the layer alone, never of the batch. Reasoned, not yet measured."""

LAUNCH = {"num_warps": 2, "num_stages": 4, "enable_fp_fusion": True}
"""Warps: a 16 x 16 result is two tensor core tiles wide; more would compute the same thing twice. Stages: three steps
of loads in flight, up to 8 KiB of shared memory each, and one at work. Fusion: said outright, because Triton's default
is about to change."""


def block_k_of(dtype: torch.dtype) -> int:
    """Input columns a step multiplies."""
    return BLOCK_COLUMNS[dtype]


def splits_of(width: int) -> int:
    """Into how many parts the sum over `width` input columns is cut."""
    return min(MOST_SPLITS, (width + SPLIT_COLUMNS - 1) // SPLIT_COLUMNS)


PROGRAMS = 528
"""Programs that share a work list, here and in expand: four for each multiprocessor of an H200. A batch with fewer
tiles leaves the rest to return at once. How the work is dealt changes no bit. Reasoned, not yet measured."""


@dataclass(frozen=True, slots=True)
class ShrinkBlocks:
    """block_k and splits decide the order of a sum, so they belong to the layer; the rest may follow the batch."""

    block_k: int
    splits: int
    programs: int = PROGRAMS
    num_warps: int = int(LAUNCH["num_warps"])
    num_stages: int = int(LAUNCH["num_stages"])


def blocks_of(x: torch.Tensor, slices: int) -> ShrinkBlocks:
    """What to launch with for an input [rows, in]: measured where `tuned.json` has it, reasoned elsewhere."""
    rows, width = x.shape
    default = {"block_k": block_k_of(x.dtype), "splits": splits_of(width)}
    return ShrinkBlocks(**{**default, **tuned("shrink", x.device, x.dtype, (width, slices), rows)})


CHUNK = 1024
"""Columns of 16 rows that a program produces at a time: 14 programs for 16 rows of an 8B model's MLP. Unmeasured."""


@dataclass(frozen=True, slots=True)
class Produce:
    """What makes the linear's input out of what shrink is given, so that the two are one launch.

    by: "norm", from [rows, in]: RMSNorm, x / rms(x) rounded, times `gain` [in]
        "silu", from [rows, 2 * in]: silu of the first half rounded, times the second
    into: [rows, in], written for the base linear to read
    """

    by: str
    into: torch.Tensor
    gain: torch.Tensor | None = None
    eps: float = 0.0


@triton.jit
def input_block(x, gain, row, column, inside, x_stride, width, inverse, INPUT: tl.constexpr):
    """[rows, columns] of the linear's input, as `Produce` has it; "x": what lies there.   inverse: [rows], 1 / rms"""
    place = x + row[:, None] * x_stride + column[None, :]
    block = tl.load(place, mask=inside, other=0.0)
    if INPUT == "norm":
        normed = (block.to(tl.float32) * inverse[:, None]).to(x.dtype.element_ty)
        gains = tl.load(gain + column, mask=column < width, other=0.0)
        block = (normed.to(tl.float32) * gains.to(tl.float32)[None, :]).to(x.dtype.element_ty)
    if INPUT == "silu":
        gate = block.to(tl.float32)
        up = tl.load(place + width, mask=inside, other=0.0)
        active = (gate / (1.0 + tl.exp(-gate))).to(x.dtype.element_ty)
        block = (active.to(tl.float32) * up.to(tl.float32)).to(x.dtype.element_ty)
    return block


@triton.jit
def inverse_rms(x, row, in_tile, x_stride, width, eps, TILE_ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[TILE_ROWS] of 1 / rms over all the width, which every program finds anew, in one order."""
    squares = tl.full((TILE_ROWS, BLOCK_K), 0.0, tl.float32)
    for step in range((width + BLOCK_K - 1) // BLOCK_K):
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = in_tile[:, None] & (column < width)[None, :]
        block = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += block * block
    return tl.rsqrt(tl.reduce(squares, 1, tl.standard._sum_combine) / width + eps)


@triton.jit
def write_input(
    x,
    gain,
    produced,
    rows,
    width,
    x_stride,
    produced_stride,
    eps,
    TILE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    INPUT: tl.constexpr,
):
    """produced = the linear's input of all rows, TILE_ROWS rows and CHUNK columns at a time."""
    chunks = (width + CHUNK - 1) // CHUNK
    for unit in range(tl.program_id(0), (rows + TILE_ROWS - 1) // TILE_ROWS * chunks, tl.num_programs(0)):
        row = (unit // chunks * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
        in_rows = row < rows
        inverse = tl.full((TILE_ROWS,), 1.0, tl.float32)
        if INPUT == "norm":
            inverse = inverse_rms(x, row, in_rows, x_stride, width, eps, TILE_ROWS, BLOCK_K)
        for step in range(CHUNK // BLOCK_K):
            column = unit % chunks * CHUNK + step * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = in_rows[:, None] & (column < width)[None, :]
            made = input_block(x, gain, row, column, inside, x_stride, width, inverse, INPUT)
            tl.store(produced + row[:, None] * produced_stride + column[None, :], made, mask=inside)


@triton.jit
def shrink_kernel(
    x,
    gain,
    produced,
    a,
    shrunk,
    order,
    tiles,
    items,
    counts,
    page_table,
    ranks,
    eps,
    rows,
    width,
    x_stride,
    produced_stride,
    pool_rows,
    slots,
    max_pages,
    rank_columns,
    part_stride,
    tile_capacity,
    item_capacity,
    SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    INPUT: tl.constexpr,
):
    """Tiles of rows x pages of ranks, one after another; one part of the input columns, of one slice.

    Semantics:
        for each item, position p of its tile, that row i = order[p] and slot s, each rank j < ranks[t, s] of its page:
            shrunk[t, part, p, j] = sum over the part's columns k, ascending:  x[i, k] * A[t, s][j, k]
        Nothing else of `shrunk` is written; the unscaled sum is float32.
        With an INPUT to produce (see `Produce`), it stands for x[i], and produced[i] = it for every row i, those of
        the base model too. Nobody waits for `produced`: each program makes the input it multiplies.
    Shape:
        grid: (any, slices * SPLITS); program i of the first takes the items i, i + any, ... to the count. With an
            INPUT to produce, one more of the second: program i takes CHUNK columns of TILE_ROWS rows, and so on
        x: [rows, width], rows x_stride apart              fp32, fp16 or bf16; "silu": [rows, 2 * width]
        gain: [width]   produced: [rows, width]            as x; read and written for an INPUT to produce only
        a: [slices, pool_rows, width]                      as x
        shrunk: [slices, SPLITS, rows, rank_columns]       float32; part_stride = rows * rank_columns
        order: [rows]   tiles, items, counts: see `WorkList`   page_table: [slices, slots, max_pages]
        ranks: [slices, slots]                             int32
    Cost, for a tile of adapter rank r in one slice, b bytes a value:
        bytes: r * width * b of A, once; 16 * width * b of x for every page, from L2 after the first; 64 * r * SPLITS
        written. FLOPs: 2 * 16 * width * 16 * ceil(r / 16).
        INPUT "norm": x once more for every program, from L2; "silu": twice the x.
    """
    if INPUT != "x":
        writes_input = tl.program_id(1) == tl.num_programs(1) - 1
        if writes_input:
            write_input(
                x, gain, produced, rows, width, x_stride, produced_stride, eps, TILE_ROWS, BLOCK_K, CHUNK, INPUT
            )
            return

    slice_index = tl.program_id(1) // SPLITS
    part = tl.program_id(1) % SPLITS
    lane = tl.arange(0, PAGE_ROWS)
    steps_of_part = (width + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    first_column = part * steps_of_part * BLOCK_K
    part_index = (slice_index * SPLITS + part).to(tl.int64)

    for item in range(tl.program_id(0), tl.load(counts + 1), tl.num_programs(0)):
        tile = tl.load(items + item)
        page = tl.load(items + item_capacity + item)
        slice_slot = slice_index * slots + tl.load(tiles + tile)
        rank = tl.load(ranks + slice_slot)
        if page * PAGE_ROWS < rank:
            position = tl.load(tiles + tile_capacity + tile) + tl.arange(0, TILE_ROWS)
            in_tile = position < tl.load(tiles + 2 * tile_capacity + tile)
            row = tl.load(order + position, mask=in_tile, other=0).to(tl.int64)
            rank_row = page * PAGE_ROWS + lane
            in_rank = rank_row < rank
            pool_page = tl.load(page_table + slice_slot * max_pages + page).to(tl.int64)
            pool_row = slice_index.to(tl.int64) * pool_rows + pool_page * PAGE_ROWS + lane

            inverse = tl.full((TILE_ROWS,), 1.0, tl.float32)
            if INPUT == "norm":
                inverse = inverse_rms(x, row, in_tile, x_stride, width, eps, TILE_ROWS, BLOCK_K)
            total = tl.full((TILE_ROWS, PAGE_ROWS), 0.0, tl.float32)
            for step in range(steps_of_part):
                column = first_column + step * BLOCK_K + tl.arange(0, BLOCK_K)
                in_width = column < width
                inside = in_tile[:, None] & in_width[None, :]
                x_block = input_block(x, gain, row, column, inside, x_stride, width, inverse, INPUT)
                a_block = tl.load(
                    a + pool_row[None, :] * width + column[:, None],
                    mask=in_rank[None, :] & in_width[:, None],
                    other=0.0,
                )
                # "ieee": float32 is not rounded to TF32; 16-bit products are exact in float32 either way.
                total = tl.dot(x_block, a_block, total, input_precision="ieee")

            place = part_index * part_stride + position[:, None].to(tl.int64) * rank_columns + rank_row[None, :]
            tl.store(shrunk + place, total, mask=in_tile[:, None] & in_rank[None, :])
