"""When the torch path gathers adapters anew, which copies all their weights: seldom, and never too late."""

from __future__ import annotations

import pytest

from services.inference.adapters.slot_pool import SlotPool
from services.inference.model.runner import ActiveSlots
from tests.inference.adapters.packs import Pack, base_shapes, make_pool


@pytest.fixture
def pool(packs: dict[str, Pack]) -> SlotPool:
    pool = make_pool(max_loras=4)
    for pack in list(packs.values())[:4]:
        pool.load(pack.adapter(base_shapes()))
    return pool


def test_slots_that_take_part_no_more_stay_while_they_are_no_more_than_the_others(pool: SlotPool) -> None:
    active = ActiveSlots(pool, spares=True)
    all_four = active.of({0, 1, 2, 3})
    assert active.of({1, 3}) is all_four
    assert list(active.of({3}).slots) == [3]


def test_a_slot_more_makes_a_new_set(pool: SlotPool) -> None:
    active = ActiveSlots(pool, spares=True)
    active.of({0, 1})
    assert list(active.of({0, 2}).slots) == [0, 2]


def test_a_spare_slot_that_holds_another_adapter_now_makes_a_new_set(pool: SlotPool, packs: dict[str, Pack]) -> None:
    active = ActiveSlots(pool, spares=True)
    before = active.of({0, 1})
    evicted = next(slot for slot in pool.slots() if slot.index == 1)
    pool.evict(evicted.digest)
    assert pool.load(list(packs.values())[4].adapter(base_shapes())).index == 1
    assert active.of({0}) is not before
    assert list(active.of({0}).slots) == [0]


def test_a_step_of_the_base_model_leaves_the_set_as_it_is(pool: SlotPool) -> None:
    active = ActiveSlots(pool)
    before = active.of({0, 1})
    assert not active.of(set()).slots
    assert active.of({1, 0}) is before
    assert list(active.of({0}).slots) == [0], "without spares it holds what was asked for alone"
