"""Which blocks hold which request's keys and values."""

from __future__ import annotations

from collections.abc import Iterable

from services.inference.engine.block_pool import BlockPool
from services.inference.engine.request import Request


class KVCacheManager:
    """Gives requests room for the tokens they compute, and takes it back."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size

    def can_append(self, request: Request, num_tokens: int) -> bool:
        """Whether the next `num_tokens` tokens of `request` find room."""
        return self.pool.can_allocate(self._missing_blocks(request, num_tokens))

    def append(self, request: Request, num_tokens: int) -> None:
        """Make room for them; ask `can_append` first."""
        request.block_ids += self.pool.allocate(self._missing_blocks(request, num_tokens))

    def free(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0

    def _missing_blocks(self, request: Request, num_tokens: int) -> int:
        needed = -(-(request.num_computed_tokens + num_tokens) // self.block_size)
        return max(0, needed - len(request.block_ids))

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raise AssertionError unless the taken blocks are exactly those of `requests`, each once, enough for each."""
        self.pool.check_integrity()
        held = [block for request in requests for block in request.block_ids]
        assert len(held) == len(set(held)), "two requests share a block"
        assert self.pool.num_free + len(held) == self.pool.num_blocks - 1, "a taken block belongs to nobody"
        for request in requests:
            assert request.num_computed_tokens <= len(request.block_ids) * self.block_size, "keys outside the blocks"
