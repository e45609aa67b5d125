"""The kernels' work list: the rows of a batch, sorted by slot and cut into tiles that each lie within one slot.

Decode with one row an adapter and prefill with long segments are the same list, only with shorter or longer runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS = 16
"""Batch rows in a tile: the fewest a tensor core multiplies, so a decode row wastes the least. The same for every
batch, decode or prefill: a row then meets the same instructions, in the same order, whoever shares its batch."""

NO_SLOT = -1
"""The slot of a tile past the end of the list."""


@dataclass(frozen=True, eq=False, slots=True)
class RowTiles:
    """Tiles over the rows stable-sorted by slot; a *position* is a row's place in that order.

    order: [rows] int32, the row at each position
    slots: [tiles] int32, the adapter of each tile; `NO_SLOT` past the end
    starts, ends: [tiles] int32, its positions; never more than `TILE_ROWS`
    """

    order: Tensor
    slots: Tensor
    starts: Tensor
    ends: Tensor


def build_row_tiles(row_slots: Tensor, slot_ids: Tensor) -> RowTiles:
    """Cut a batch into tiles on its own device, without waiting for it.

    How many tiles there are is known only to the device, so the list is as long as any such batch could need.

    Shape:
        row_slots: [rows] int32   slot_ids: [slots] int32, distinct; rows of any other slot get no tile
    """
    rows, slots = row_slots.numel(), slot_ids.numel()
    ordered, order = row_slots.sort(stable=True)
    starts = torch.searchsorted(ordered, slot_ids)
    ends = torch.searchsorted(ordered, slot_ids, right=True)
    tiles_of_slot = (ends - starts + TILE_ROWS - 1) // TILE_ROWS
    last_tiles = tiles_of_slot.cumsum(0)

    segments = min(slots, rows)
    most_tiles = (rows + (TILE_ROWS - 1) * segments) // TILE_ROWS if segments else 0
    tile = torch.arange(most_tiles, device=row_slots.device)
    owner = torch.searchsorted(last_tiles, tile, right=True)
    beyond = owner == slots
    owner = owner.clamp(max=slots - 1)
    start = starts[owner] + (tile - last_tiles[owner] + tiles_of_slot[owner]) * TILE_ROWS
    return RowTiles(
        order=order.int(),
        slots=slot_ids[owner].masked_fill(beyond, NO_SLOT),
        starts=start.int(),
        ends=torch.minimum(start + TILE_ROWS, ends[owner]).int(),
    )
