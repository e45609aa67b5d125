"""The KV cache's blocks: who has which, and which still hold what later requests may share. The tensors are the
runner's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0
"""Never given out; block tables are padded with it."""


class BlockPool:
    """Owns the ids of `num_blocks` KV blocks.

    A block is *taken* by one or more requests, or *free*. Free blocks are given out least recently freed first; one
    that holds the keys and values of a known prefix may be shared again until then.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._references = [0] * num_blocks
        self._prefix_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that hold a known prefix, taken ones among them."""
        return len(self._prefix_of)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; ask `can_allocate` first. What they hold is garbage, perhaps NaN, and now forgotten."""
        assert self.can_allocate(count), "asked for more blocks than are free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            if (prefix := self._prefix_of.pop(block, None)) is not None:
                del self._block_of[prefix]
        return blocks

    def find(self, prefix: bytes) -> int | None:
        """The block that holds the end of this prefix."""
        return self._block_of.get(prefix)

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody has taken: sharing them makes so many fewer free."""
        return sum(not self._references[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Take blocks that others may have too."""
        for block in blocks:
            self._free.pop(block, None)
            self._references[block] += 1

    def remember(self, block: int, prefix: bytes) -> None:
        """A taken block's keys and values are computed: they are this prefix's. The first block of a prefix stays."""
        assert self._references[block], "a free block is remembered"
        if prefix not in self._block_of and block not in self._prefix_of:
            self._prefix_of[block] = prefix
            self._block_of[prefix] = block

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back, in the order of their context: its end is forgotten first, since only a whole beginning
        can be shared."""
        for block in reversed(blocks):
            assert self._references[block] > 0, "a block is freed that nobody has"
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if block not in self._prefix_of:
                    self._free.move_to_end(block, last=False)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block but the null block is free or taken, and prefixes are found."""
        assert NULL_BLOCK not in self._free and not self._references[NULL_BLOCK], "the null block was given out"
        for block in range(1, self.num_blocks):
            assert self._references[block] >= 0
            assert (block in self._free) == (not self._references[block]), f"block {block} is lost, or free and taken"
        assert self._block_of == {prefix: block for block, prefix in self._prefix_of.items()}, "a prefix is lost"

    def references(self, block: int) -> int:
        """How many requests have the block."""
        return self._references[block]
