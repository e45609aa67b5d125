"""Adapters of every rank in and out of the pool in any order: each reads back whole, and no page is lost or shared."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.adapters import copies
from services.inference.adapters.slot_pool import SlotPool, pages_for
from tests.inference.adapters.lanes import HeldLanes
from tests.inference.adapters.packs import LAYERS, Pack, base_shapes, lying, make_pool, poison

Operation = tuple[str, int]


def check_contents(pool: SlotPool, resident: dict[str, Pack], dtype: torch.dtype) -> None:
    pool.check_integrity()
    assert {slot.digest for slot in pool.slots()} == set(resident)
    adapters = {digest: pack.adapter(base_shapes(dtype=dtype)) for digest, pack in resident.items()}
    for digest, layer, linear, pages, a, b, rank, scale in lying(pool):
        adapter = adapters[digest]
        module = adapter.module(layer, linear)
        assert pages == pages_for(adapter.ranks.get(linear, 0))
        assert rank == (0 if module is None else module.rank)
        if module is not None:
            assert scale == pytest.approx(module.scale)
            assert torch.equal(a[:rank], module.a.to(dtype))
            assert torch.equal(b[:rank], module.b.to(dtype))
        assert not a[rank:].any() and not b[rank:].any(), "a page's tail is not zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside steps"])
@given(
    operations=st.lists(st.tuples(st.sampled_from(["load", "load", "evict", "touch"]), st.integers(0, 7)), max_size=14),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=25, deadline=None)
def test_any_order_of_loads_and_evictions(
    packs: dict[str, Pack], dtype: torch.dtype, beside: bool, operations: Sequence[Operation], order: random.Random
) -> None:
    """Beside steps, lanes do some of their work after each operation; pages change hands with copies under way."""
    lanes = HeldLanes() if beside else None
    pool = make_pool(max_loras=3, dtype=dtype, lanes=lanes)
    poison(pool)
    everyone, resident = list(packs.values()), dict[str, Pack]()
    for operation, index in operations:
        pack = everyone[index]
        digest = pack.version.digest
        if operation == "load" and digest not in resident:
            adapter = pack.adapter(base_shapes(dtype=dtype))
            assert pool.can_load(adapter) == (len(resident) < 3), "every slot must have room for the highest rank"
            if pool.can_load(adapter):
                before = [pool.generation(slot) for slot in range(3)]
                slot = pool.load(adapter)
                assert pool.generation(slot.index) != before[slot.index]
                resident[digest] = pack
        elif operation == "evict" and digest in resident:
            pool.evict(digest)
            del resident[digest]
        elif operation == "touch" and digest in resident:
            pool.touch(digest)
            resident[digest] = resident.pop(digest)
        assert [slot.digest for slot in pool.slots()] == list(resident), "not in the order of use"
        pool.check_integrity()
        if lanes is None:
            check_contents(pool, resident, dtype)
        else:
            lanes.work(order.randint(0, 4), order)
            assert not pool.poll()
    if lanes is not None:
        lanes.work(order=order)
        assert not pool.poll()
        assert all(slot.arrived for slot in pool.slots())
    check_contents(pool, resident, dtype)


def test_adapters_that_are_copied_take_turns_layer_by_layer(
    packs: dict[str, Pack], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "AHEAD_BYTES", 1)
    lanes = HeldLanes()
    pool = make_pool(lanes=lanes)
    slots = [pool.load(packs[name].adapter()) for name in ("rank-40", "rank-16", "rank-1")]
    arrived = []
    while not all(slot.arrived for slot in slots):
        lanes.work()
        pool.poll()
        arrived.append(sum(slot.arrived for slot in slots))
    assert len(lanes.done) == 3 * 2 * LAYERS
    assert arrived == [0, 1, 1, 1, 2, 3], "the second and the third are half there before either is whole"


@pytest.mark.parametrize("name", ["rank-17", "rank-40", "patterns", "one-layer"])
def test_of_an_adapter_a_rank_has_its_columns(packs: dict[str, Pack], name: str) -> None:
    """Copied whole and cut as it is scattered, or cut in host memory: the same."""
    lanes = HeldLanes()
    pools = [make_pool(lanes=each, rank=1, parts=2) for each in (None, lanes)]
    for pool in pools:
        poison(pool)
        pool.load(packs[name].adapter())
    lanes.work()
    pools[1].poll()
    for expected, found in zip(*map(lying, pools), strict=True):
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_who_follows_a_copy_waits_for_each_layer_and_others_for_none(
    packs: dict[str, Pack], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "AHEAD_BYTES", 1)
    lanes = HeldLanes()
    pool = make_pool(lanes=lanes)
    there = pool.load(packs["rank-1"].adapter())
    while not there.arrived:
        lanes.work()
        pool.poll()
    slot = pool.load(packs["half"].adapter())
    assert pool.may_follow(there) and not pool.may_follow(slot), "a layer is yet to begin"
    lanes.waits.clear()
    pool.wait({there.index})
    assert not lanes.waits
    pool.wait({slot.index, there.index}, 0)
    assert pool.may_follow(slot), "whoever waits begins what is left"
    pool.wait({slot.index}, 1)
    pool.wait({slot.index})
    assert lanes.waits == ["scatter 6", "scatter 8", "scatter 8"]


def test_an_adapter_takes_the_pages_of_its_rank(packs: dict[str, Pack]) -> None:
    pool = make_pool()
    pages = {name: pool.load(packs[name].adapter()).num_pages for name in ("rank-1", "rank-16", "rank-17")}
    assert pages == {"rank-1": 1, "rank-16": 7, "rank-17": 6}


def test_a_held_slot_is_not_evicted(packs: dict[str, Pack]) -> None:
    pool = make_pool()
    slot = pool.load(packs["half"].adapter())
    slot.references = 1
    with pytest.raises(AssertionError, match="held"):
        pool.evict(slot.digest)


def test_an_evicted_slot_has_no_ranks_left(packs: dict[str, Pack]) -> None:
    pool = make_pool(max_loras=1)
    slot = pool.load(packs["rank-40"].adapter())
    pool.evict(slot.digest)
    assert not any(weights.ranks.any() for groups in pool.weights for weights in groups.values())
    assert all(pages == [()] for table in pool.tables.values() for pages in table.pages)
    assert pool.can_load(packs["rank-40"].adapter())
