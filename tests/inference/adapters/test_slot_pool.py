"""Adapters of every rank in and out of the pool in any order: each reads back whole, and no page is lost or shared."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.adapters.slot_pool import SlotPool, pages_for
from tests.inference.adapters.packs import Pack, base_shapes, lying, make_pool, poison

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
@given(
    operations=st.lists(st.tuples(st.sampled_from(["load", "load", "evict", "touch"]), st.integers(0, 7)), max_size=14)
)
@settings(max_examples=25, deadline=None)
def test_any_order_of_loads_and_evictions(
    packs: dict[str, Pack], dtype: torch.dtype, operations: Sequence[Operation]
) -> None:
    pool = make_pool(max_loras=3, dtype=dtype)
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
        check_contents(pool, resident, dtype)


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
