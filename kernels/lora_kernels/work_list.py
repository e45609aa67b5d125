"""The kernels' work list: the rows of a batch, sorted by slot and cut into tiles that each lie within one slot.

Decode with one row an adapter and prefill with long segments are the same list, only with shorter or longer runs.
The buffers have a fixed size and address, and how much of them a batch uses is known to the device alone: so a CUDA
graph that was captured over them serves every batch that fits, whatever adapters and ranks it mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_kernels.errors import RankOverPool, SlotOutOfRange, WorkListOverflow

TILE_ROWS = 16
"""Batch rows in a tile: the fewest a tensor core multiplies, so a decode row wastes the least. The same for every
batch, decode or prefill: a row then meets the same instructions, in the same order, whoever shares its batch."""

BASE_ROW = -1
"""The slot of a row that asks for the base model alone."""


@dataclass(eq=False, slots=True)
class WorkList:
    """Fixed buffers for batches of `rows` rows over `slots` slots; a *position* is a row's place sorted by slot.

    rows, slots, max_pages: what the buffers are for; max_pages bounds the pages that a slot owns in any slice
    packed: [rows + slots] int32, what the host says: each row's slot, then each slot's pages in its widest slice
    order: [rows] int32, the row at each position
    tiles: [3, tile capacity] int32: a tile's slot, its first position and its end, at most `TILE_ROWS` later
    items: [2, item capacity] int32: the pairs (tile, page) of all tiles
    counts: [2] int32, how many tiles and items there are
    overflows: batches that did not fit and went another way
    """

    rows: int
    slots: int
    max_pages: int
    packed: Tensor
    order: Tensor
    tiles: Tensor
    items: Tensor
    counts: Tensor
    overflows: int = 0

    @classmethod
    def allocate(
        cls, rows: int, slots: int, max_pages: int, device: torch.device, item_capacity: int | None = None
    ) -> WorkList:
        """item_capacity: fewer items than such a batch could need, to save memory; `stage` refuses more."""
        tiles = most_tiles(rows, slots)
        items = tiles * max_pages if item_capacity is None else item_capacity

        def integers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            rows,
            slots,
            max_pages,
            packed=integers(rows + slots),
            order=integers(rows),
            tiles=integers(3, tiles),
            items=integers(2, items),
            counts=torch.zeros(2, dtype=torch.int32, device=device),
        )

    def stage(self, row_slots: Sequence[int], pages_of_slot: Sequence[int]) -> bool:
        """Send a batch up in one copy, from pinned memory where there is a GPU, without waiting for it.

        Rows short of `rows` are padded with the base model's. False, counted in `overflows`: the batch needs more rows
        or items than there are, nothing was copied, and the caller takes a list of the batch's own.
        From memory of its own, so the copy before may be on its way still; what reads the buffers comes before it.

        row_slots: each row's slot or `BASE_ROW`
        pages_of_slot: [slots], each slot's pages in its widest slice
        Raises SlotOutOfRange, RankOverPool.
        """
        if len(pages_of_slot) != self.slots:
            raise SlotOutOfRange(f"pages_of_slot has {len(pages_of_slot)} entries for a pool of {self.slots} slots")
        rows, pages = np.asarray(row_slots, np.int32), np.asarray(pages_of_slot, np.int32)
        if pages.max(initial=0) > self.max_pages:
            raise RankOverPool(f"a slot owns {pages.max()} pages, the work list is for {self.max_pages}")
        check_slots(rows, self.slots)
        if not self._fits(rows, pages):
            self.overflows += 1
            return False
        pinned = torch.empty(self.packed.shape, dtype=torch.int32, pin_memory=self.packed.is_cuda)
        staged = pinned.numpy()
        staged[: len(rows)] = rows
        staged[len(rows) : self.rows] = BASE_ROW
        staged[self.rows :] = pages
        self.packed.copy_(pinned, non_blocking=True)
        return True

    def _fits(self, rows: NDArray[np.int32], pages_of_slot: NDArray[np.int32]) -> bool:
        if len(rows) > self.rows:
            return False
        rows_of_slot = np.bincount(rows + 1, minlength=self.slots + 1)[1:]
        tiles_of_slot = (rows_of_slot + TILE_ROWS - 1) // TILE_ROWS
        return int(tiles_of_slot @ pages_of_slot) <= self.items.shape[1]


def most_tiles(rows: int, slots: int) -> int:
    """Tiles that no batch of so many rows over so many slots exceeds."""
    segments = min(slots, rows)
    return (rows + (TILE_ROWS - 1) * segments) // TILE_ROWS


def check_slots(row_slots: NDArray[np.int32], slots: int) -> None:
    """Raise SlotOutOfRange unless every row names a slot of the pool or the base model."""
    wrong = (row_slots < BASE_ROW) | (row_slots >= slots)
    if wrong.any():
        row = int(wrong.argmax())
        raise SlotOutOfRange(f"row {row} names slot {row_slots[row]}; the pool has slots 0 to {slots - 1}")


def check_rows(work: WorkList, rows: int) -> None:
    """Raise WorkListOverflow unless the list is for exactly so many rows."""
    if rows != work.rows:
        raise WorkListOverflow(f"x has {rows} rows, the work list is for {work.rows}: pad the batch to its bucket")
