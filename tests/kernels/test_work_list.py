"""The work list against a loop that says what it should be, and what is refused before a launch."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch

from lora_kernels import BASE_ROW
from lora_kernels.errors import LoraInputError, MixedDtypes, NotContiguous, RankOverPool, SlotOutOfRange
from lora_kernels.work_list import TILE_ROWS, WorkList
from tests.kernels.path_contract import MIXED_RANKS, QKV
from tests.kernels.pool_builder import bits, build_pool

CPU = torch.device("cpu")
PAGES = [1, 3, 0, 2, 1, 5]


def tiles_by_loop(row_slots: list[int]) -> list[tuple[int, list[int]]]:
    """(slot, its rows) of every tile."""
    tiles = []
    for slot in range(len(PAGES)):
        rows = [row for row, of_row in enumerate(row_slots) if of_row == slot]
        tiles += [(slot, rows[start : start + TILE_ROWS]) for start in range(0, len(rows), TILE_ROWS)]
    return tiles


def test_one_list_serves_every_mix(triton_path: ModuleType) -> None:
    """Every row of a slot is in one tile, in order, and every tile meets each of its slot's pages once."""
    work = WorkList.allocate(100, len(PAGES), max(PAGES), CPU)
    made = random.Random(0)
    batches = [[made.randint(-1, 5) for _ in range(rows)] for rows in (100, 7, 83)]
    for row_slots in [*batches, [1] * 100, [], [5] * 17 + [0]]:
        assert work.stage(row_slots, PAGES)
        triton_path.triton_work_list.build_work_list(work)
        tile_count, item_count = work.counts.tolist()
        order = work.order.tolist()
        assert sorted(order) == list(range(100))
        tiles = [(slot, order[start:end]) for slot, start, end in work.tiles[:, :tile_count].T.tolist()]
        assert tiles == tiles_by_loop(row_slots)
        pairs = [(tile, page) for tile, (slot, _) in enumerate(tiles) for page in range(PAGES[slot])]
        assert sorted(map(tuple, work.items[:, :item_count].T.tolist())) == pairs


def test_fixed_buffers_give_the_bits_of_a_batchs_own(triton_path: ModuleType) -> None:
    pool = build_pool(MIXED_RANKS, 40, QKV)
    work = WorkList.allocate(12, len(MIXED_RANKS), 4, CPU)
    for row_slots in ([0, 1, 2, 3, 4, BASE_ROW, 1, 1], [BASE_ROW] * 12, [3] * 12):
        y, x = pool.inputs(12)
        own = y.clone()
        padded = row_slots + [BASE_ROW] * (12 - len(row_slots))
        triton_path.apply_lora_triton(own, x, pool.weights, pool.batch(padded))
        batch = pool.batch(padded)
        assert work.stage(row_slots, batch.active.pages_of_slot)
        triton_path.triton_work_list.build_work_list(work)
        batch.work = work
        triton_path.apply_lora_triton(y, x, pool.weights, batch)
        assert bits(y).equal(bits(own))


def test_what_does_not_fit_is_counted_and_not_copied() -> None:
    work = WorkList.allocate(20, len(PAGES), max(PAGES), CPU, item_capacity=6)
    assert work.stage([1, 3], PAGES)
    before = work.packed.clone()
    assert not work.stage([1, 3, 5], PAGES)
    assert not work.stage([0] * 21, PAGES)
    assert work.overflows == 2
    assert work.packed.equal(before)


def test_bad_slots_and_ranks_are_refused() -> None:
    work = WorkList.allocate(4, len(PAGES), max(PAGES), CPU)
    with pytest.raises(SlotOutOfRange, match="row 1 names slot 6"):
        work.stage([0, 6], PAGES)
    with pytest.raises(SlotOutOfRange, match="row 0 names slot -2"):
        work.stage([-2], PAGES)
    with pytest.raises(RankOverPool):
        work.stage([0], [9, *PAGES[1:]])


def test_bad_tensors_are_refused_and_nothing_is_written(triton_path: ModuleType) -> None:
    pool = build_pool(MIXED_RANKS, 40, QKV)
    y, x = pool.inputs(3)
    before = y.clone()
    batch = pool.batch([0, 1, 3])
    with pytest.raises(MixedDtypes):
        triton_path.apply_lora_triton(y, x.half(), pool.weights, batch)
    with pytest.raises(NotContiguous):
        triton_path.apply_lora_triton(y, x.T.contiguous().T, pool.weights, batch)
    with pytest.raises(LoraInputError, match="expected"):
        triton_path.apply_lora_triton(y, x[:, :39], pool.weights, batch)
    with pytest.raises(LoraInputError, match="pad the batch"):
        triton_path.apply_lora_triton(y[:2], x[:2], pool.weights, pool_batch_with_list(triton_path, pool))
    assert y.equal(before)


def pool_batch_with_list(triton_path: ModuleType, pool: object) -> object:
    batch = pool.batch([0, 1, 3])  # type: ignore[attr-defined]
    triton_path.work_of(batch)
    return batch
