"""Which blocks hold which request's keys and values, and whose beginning others may share.

A full block's *prefix* is a hash over everything that its keys and values depend on: the adapter's content digest, the
caller's salt, and every token up to the block's end. So an adapter that was uploaded again under its old name never
meets the old one's cache, and whoever does not know a salt cannot probe what others asked.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection
from hashlib import blake2b

from services.inference.engine.block_pool import BlockPool
from services.inference.engine.request import Request


class KVCacheManager:
    """Gives requests room for the tokens they compute, and takes it back.

    queried_tokens, hit_tokens: prompt tokens that were looked for in the prefix cache, and found
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.queried_tokens = 0
        self.hit_tokens = 0

    def can_admit(self, request: Request, reserve: int) -> bool:
        """Whether a request that holds nothing finds room for all it has to compute, `reserve` blocks left over."""
        needed = -(-len(request.token_ids) // self.block_size)
        if self.pool.can_allocate(needed + reserve):
            return True
        shared = self._cached_blocks(request)
        return self.pool.can_allocate(needed - len(shared) + self.pool.num_idle(shared) + reserve)

    def admit(self, request: Request) -> None:
        """Share what is computed already of a request that holds nothing; ask `can_admit` first."""
        assert not request.block_ids, "admitted twice"
        request.block_ids = self._cached_blocks(request)
        self.pool.share(request.block_ids)
        request.num_computed_tokens = len(request.block_ids) * self.block_size
        if request.first_scheduled_time is None:
            request.num_cached_tokens = request.num_computed_tokens
            self.queried_tokens += len(request.prompt_token_ids) if self.enable_prefix_caching else 0
            self.hit_tokens += request.num_cached_tokens

    def can_append(self, request: Request, num_tokens: int) -> bool:
        """Whether the next `num_tokens` tokens of `request` find room."""
        return self.pool.can_allocate(self._missing_blocks(request, num_tokens))

    def append(self, request: Request, num_tokens: int) -> None:
        """Make room for them; ask `can_append` first."""
        request.block_ids += self.pool.allocate(self._missing_blocks(request, num_tokens))

    def remember(self, request: Request, end: int) -> None:
        """Let others share the full blocks among its first `end` tokens, which a step has computed that was read."""
        if not self.enable_prefix_caching:
            return
        end = min(end, request.num_computed_tokens)  # it may have lost its blocks since
        for index in range(request.num_remembered_blocks, end // self.block_size):
            self.pool.remember(request.block_ids[index], self._prefix(request, index))
            request.num_remembered_blocks = index + 1

    def free(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.num_remembered_blocks = 0

    def _missing_blocks(self, request: Request, num_tokens: int) -> int:
        needed = -(-(request.num_computed_tokens + num_tokens) // self.block_size)
        return max(0, needed - len(request.block_ids))

    def _cached_blocks(self, request: Request) -> list[int]:
        """Blocks that hold the request's beginning. Its last token is always left to compute: someone must say what
        comes next."""
        blocks: list[int] = []
        if self.enable_prefix_caching:
            for index in range((len(request.token_ids) - 1) // self.block_size):
                block = self.pool.find(self._prefix(request, index))
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def _prefix(self, request: Request, index: int) -> bytes:
        """The prefix that ends with the request's full block `index`; hashed once."""
        prefixes = request.prefixes
        while len(prefixes) <= index:
            start = len(prefixes) * self.block_size
            before = prefixes[-1] if prefixes else _seed(request)
            tokens = array("I", request.token_ids[start : start + self.block_size])
            prefixes.append(blake2b(before + tokens.tobytes(), digest_size=32).digest())
        return prefixes[index]

    def check_integrity(self, requests: Collection[Request]) -> None:
        """Raise AssertionError unless blocks are taken exactly by `requests`, and each has enough."""
        self.pool.check_integrity()
        held = Counter(block for request in requests for block in request.block_ids)
        for block in range(1, self.pool.num_blocks):
            assert self.pool.references(block) == held[block], f"block {block} is taken by others than its requests"
        for request in requests:
            assert len(request.block_ids) == len(set(request.block_ids)), "a request has a block twice"
            assert request.num_computed_tokens <= len(request.block_ids) * self.block_size, "keys outside the blocks"


def _seed(request: Request) -> bytes:
    digest = request.adapter.digest if request.adapter is not None else ""
    return blake2b(f"{len(digest)}:{digest}{request.cache_salt}".encode(), digest_size=32).digest()
