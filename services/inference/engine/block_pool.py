"""The KV cache's blocks: who has which. The tensors are the runner's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

NULL_BLOCK = 0
"""Never given out; block tables are padded with it."""


class BlockPool:
    """Owns the ids of `num_blocks` KV blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(1, num_blocks))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; ask `can_allocate` first. What they hold is garbage, perhaps NaN."""
        assert self.can_allocate(count), "asked for more blocks than are free"
        blocks = [self._free.popleft() for _ in range(count)]
        self._taken.update(blocks)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._taken.remove(block)
            self._free.append(block)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block but the null block is free or taken, and not both."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._taken, "a block is free and taken"
        assert free | self._taken == set(range(1, self.num_blocks)), "a block is lost"
