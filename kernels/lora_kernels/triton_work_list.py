"""Builds the work list on the device: one launch a step, no sort, no atomics, no host."""

# A kernel is Triton's language in Python's syntax: its arguments have no Python types, its constants are capitals.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.work_list import TILE_ROWS, WorkList

BLOCK = 64
"""Rows a program places, and list entries it writes at a time. Reasoned, not yet measured."""

COMPARISONS = 4096
"""Values a program compares at a time: 32 registers a thread."""

LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def chunk_of(slots_block: int) -> int:
    """Rows that one comparison takes beside `slots_block` slots."""
    return max(16, COMPARISONS // max(slots_block, BLOCK))


@triton.jit
def work_list_kernel(
    packed,
    order,
    tiles,
    items,
    counts,
    rows,
    slots,
    tile_capacity,
    item_capacity,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr,
):
    """A program for each slot's tiles, then a program for each block of rows' positions.

    Semantics:
        order = the rows stable-sorted by slot, the base model's first
        tiles = for each slot, ascending, its positions cut into runs of at most TILE_ROWS
        items = for each slot, ascending, for each of its pages, for each of its tiles: (tile, page)
        counts = how many of each
        A row of a slot that does not exist counts as the base model's; entries past a capacity are not written.
        Each position is counted anew from all the rows, so no program waits for another and no order is left to chance.
    Shape:
        grid: (slots + ceil(rows / BLOCK),)
        packed: [rows + slots]   order: [rows]   tiles: [3, tile_capacity]   items: [2, item_capacity]   counts: [2]
        all int32; SLOTS_BLOCK: a power of two, at least slots
    Cost: (slots * SLOTS_BLOCK + rows) * rows comparisons, 4 * (2 * rows + slots) bytes and the list's own.
    """
    # tl.sum is a jitted function of Triton's own, which the tests' interpreter cannot call; it is this same reduction.
    program = tl.program_id(0)
    if program < slots:
        slot = tl.arange(0, SLOTS_BLOCK)
        rows_of_slot = tl.full((SLOTS_BLOCK,), 0, tl.int32)
        for first in range(0, rows, CHUNK):
            other = first + tl.arange(0, CHUNK)
            key = tl.load(packed + other, mask=other < rows, other=-1)
            rows_of_slot += tl.reduce((key[None, :] == slot[:, None]).to(tl.int32), 1, tl.standard._sum_combine)
        rows_of_slot = tl.where(slot < slots, rows_of_slot, 0)
        tiles_of_slot = (rows_of_slot + TILE_ROWS - 1) // TILE_ROWS
        pages_of_slot = tl.load(packed + rows + slot, mask=slot < slots, other=0)
        items_of_slot = tiles_of_slot * pages_of_slot

        before = slot < program
        base_rows = rows - tl.reduce(rows_of_slot, 0, tl.standard._sum_combine)
        start = base_rows + tl.reduce(tl.where(before, rows_of_slot, 0), 0, tl.standard._sum_combine)
        first_tile = tl.reduce(tl.where(before, tiles_of_slot, 0), 0, tl.standard._sum_combine)
        first_item = tl.reduce(tl.where(before, items_of_slot, 0), 0, tl.standard._sum_combine)
        own_rows = tl.reduce(tl.where(slot == program, rows_of_slot, 0), 0, tl.standard._sum_combine)
        own_tiles = tl.reduce(tl.where(slot == program, tiles_of_slot, 0), 0, tl.standard._sum_combine)
        own_items = tl.reduce(tl.where(slot == program, items_of_slot, 0), 0, tl.standard._sum_combine)

        for first in range(0, own_tiles, BLOCK):
            index = first + tl.arange(0, BLOCK)
            tile = first_tile + index
            inside = (index < own_tiles) & (tile < tile_capacity)
            tl.store(tiles + tile, tl.full((BLOCK,), 0, tl.int32) + program, mask=inside)
            tl.store(tiles + tile_capacity + tile, start + index * TILE_ROWS, mask=inside)
            end = start + tl.minimum((index + 1) * TILE_ROWS, own_rows)
            tl.store(tiles + 2 * tile_capacity + tile, end, mask=inside)
        for first in range(0, own_items, BLOCK):
            index = first + tl.arange(0, BLOCK)
            item = first_item + index
            inside = (index < own_items) & (item < item_capacity)
            tl.store(items + item, first_tile + index % own_tiles, mask=inside)
            tl.store(items + item_capacity + item, index // own_tiles, mask=inside)
        if program == slots - 1:
            tl.store(counts, tl.minimum(first_tile + own_tiles, tile_capacity))
            tl.store(counts + 1, tl.minimum(first_item + own_items, item_capacity))
    else:
        row = (program - slots) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(packed + row, mask=row < rows, other=-1)
        key = tl.where(key < slots, tl.maximum(key, -1), -1)
        position = tl.full((BLOCK,), 0, tl.int32)
        for first in range(0, rows, CHUNK):
            other = first + tl.arange(0, CHUNK)
            other_key = tl.load(packed + other, mask=other < rows, other=-1)
            other_key = tl.where(other_key < slots, tl.maximum(other_key, -1), -1)
            smaller = other_key[None, :] < key[:, None]
            earlier = (other_key[None, :] == key[:, None]) & (other[None, :] < row[:, None])
            position += tl.reduce(
                ((smaller | earlier) & (other < rows)[None, :]).to(tl.int32), 1, tl.standard._sum_combine
            )
        tl.store(order + position, row, mask=row < rows)


def build_work_list(work: WorkList) -> None:
    """Launch `work_list_kernel` over what `work.packed` holds."""
    slots_block = max(16, triton.next_power_of_2(work.slots))
    work_list_kernel[(work.slots + triton.cdiv(work.rows, BLOCK),)](
        work.packed,
        work.order,
        work.tiles,
        work.items,
        work.counts,
        work.rows,
        work.slots,
        work.tiles.shape[1],
        work.items.shape[1],
        TILE_ROWS=TILE_ROWS,
        BLOCK=BLOCK,
        CHUNK=chunk_of(slots_block),
        SLOTS_BLOCK=slots_block,
        **LAUNCH,
    )
