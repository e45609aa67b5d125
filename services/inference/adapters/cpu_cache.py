"""Adapters in host memory: a bounded number, least recently used out first, never one that a request claims."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from services.inference.adapters.packed_adapter import PackedAdapter


class CpuCache:
    """Owns the copies in host memory, and the claims that keep them.

    A claim comes before its copy: a claimed digest has its room from the moment its fetch starts.

    on_evict: called with the digest of a copy that goes; whoever builds on the copy lets go of it too
    """

    def __init__(self, max_adapters: int, on_evict: Callable[[str], None]) -> None:
        self._max_adapters = max_adapters
        self._on_evict = on_evict
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._claims: Counter[str] = Counter()

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def get(self, digest: str) -> PackedAdapter | None:
        return self._adapters.get(digest)

    def touch(self, digest: str) -> None:
        """Make the copy the most recently used one."""
        self._adapters.move_to_end(digest)

    def try_claim(self, digest: str) -> bool:
        """Keep the digest's copy, or room for it; False when claims of other digests fill the cache."""
        if digest not in self._claims and digest not in self._adapters and not self._make_room():
            return False
        self._claims[digest] += 1
        return True

    def unclaim(self, digest: str) -> None:
        assert self._claims[digest] > 0, "unclaimed more often than claimed"
        self._claims[digest] -= 1
        if not self._claims[digest]:
            del self._claims[digest]

    def is_claimed(self, digest: str) -> bool:
        return digest in self._claims

    def put(self, adapter: PackedAdapter) -> None:
        """Store a claimed digest's copy."""
        assert adapter.digest in self._claims, "a copy without a claim has no room"
        self._adapters[adapter.digest] = adapter

    def drop(self, digest: str) -> None:
        """Let the copy go, unless a request claims it."""
        if digest in self._adapters and digest not in self._claims:
            self._evict(digest)

    def _make_room(self) -> bool:
        """Whether there is room for one more digest, an unclaimed copy having gone for it if need be."""
        if len(self._adapters.keys() | self._claims.keys()) < self._max_adapters:
            return True
        victim = next((digest for digest in self._adapters if digest not in self._claims), None)
        if victim is None:
            return False
        self._evict(victim)
        return True

    def _evict(self, digest: str) -> None:
        self._on_evict(digest)
        del self._adapters[digest]

    def check_integrity(self) -> None:
        """Raise AssertionError when there are more digests than room."""
        assert len(self._adapters.keys() | self._claims.keys()) <= self._max_adapters, "host memory is overcommitted"
        assert all(count > 0 for count in self._claims.values())
