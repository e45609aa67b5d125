"""Every block is free or taken, never both, never lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.inference.engine.block_pool import NULL_BLOCK, BlockPool


class BlockPoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        taken = sum(map(len, self.held))
        assert self.pool.can_allocate(count) == (count <= self.pool.num_blocks - 1 - taken)
        if self.pool.can_allocate(count):
            blocks = self.pool.allocate(count)
            assert len(blocks) == count
            assert not set(blocks) & {NULL_BLOCK, *(block for others in self.held for block in others)}
            self.held.append(blocks)
        else:
            with pytest.raises(AssertionError):
                self.pool.allocate(count)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_free == self.pool.num_blocks - 1 - sum(map(len, self.held))

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for blocks in self.held:
                self.pool.free(blocks)
            assert self.pool.num_free == self.pool.num_blocks - 1


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_freeing_twice_is_found() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="nobody has"):
        pool.free(blocks)


def test_integrity_finds_a_lost_block() -> None:
    pool = BlockPool(4)
    pool.allocate(1)
    pool.check_integrity()
    pool._references[1] = 0
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity()
