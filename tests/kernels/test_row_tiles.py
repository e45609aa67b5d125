"""The work list against a loop that says what it should be."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.row_tiles import NO_SLOT, TILE_ROWS, build_row_tiles


def tiles_by_loop(row_slots: list[int], slot_ids: list[int]) -> list[tuple[int, list[int]]]:
    """(slot, its rows) of every tile."""
    tiles = []
    for slot in slot_ids:
        rows = [row for row, of_row in enumerate(row_slots) if of_row == slot]
        tiles += [(slot, rows[start : start + TILE_ROWS]) for start in range(0, len(rows), TILE_ROWS)]
    return tiles


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-1, 5), max_size=100), st.permutations(range(8)))
def test_tiles_hold_every_row_of_a_slot_once_and_in_order(row_slots: list[int], slot_ids: list[int]) -> None:
    tiles = build_row_tiles(torch.tensor(row_slots, dtype=torch.int32), torch.tensor(slot_ids, dtype=torch.int32))
    order = tiles.order.tolist()
    columns = zip(tiles.slots.tolist(), tiles.starts.tolist(), tiles.ends.tolist(), strict=True)
    found = [(slot, order[start:end]) for slot, start, end in columns if slot != NO_SLOT]
    assert found == tiles_by_loop(row_slots, slot_ids)


def test_one_row_a_slot_takes_one_tile_a_row() -> None:
    rows = torch.arange(64, dtype=torch.int32)
    assert build_row_tiles(rows, rows).slots.tolist() == rows.tolist()


def test_no_slots_no_tiles() -> None:
    base_rows, no_slots = torch.full((40,), -1, dtype=torch.int32), torch.tensor([], dtype=torch.int32)
    assert build_row_tiles(base_rows, no_slots).slots.numel() == 0
