"""Adapters in host memory: bounded in number and bytes, least recently used out first, never one that is claimed."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

from services.inference.adapters.packed_adapter import PackedAdapter


class CpuCache:
    """Owns the copies in host memory, and the claims that keep them.

    A claim comes before its copy: a claimed digest has its room from the moment its fetch starts.
    A pinned copy goes only when every other one is pinned too: pins may fill the cache, and keep nobody else out.

    max_bytes: 0 bounds the number alone
    on_evict: called with the digest of a copy that goes; whoever builds on the copy lets go of it too
    """

    def __init__(self, max_adapters: int, on_evict: Callable[[str], None], max_bytes: int = 0) -> None:
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._on_evict = on_evict
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._claims: Counter[str] = Counter()
        self._sizes: dict[str, int] = {}
        self.pinned: dict[str, None] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def get(self, digest: str) -> PackedAdapter | None:
        return self._adapters.get(digest)

    def touch(self, digest: str) -> None:
        """Make the copy the most recently used one."""
        self._adapters.move_to_end(digest)

    def could_hold(self, size: int) -> bool:
        """Whether a copy of this size fits when it is alone."""
        return not self._max_bytes or size <= self._max_bytes

    def try_claim(self, digest: str, size: int = 0) -> bool:
        """Keep the digest's copy, or room for its `size` bytes; False when claims of others fill the cache."""
        if digest not in self._sizes:
            if not self._make_room(size):
                return False
            self._sizes[digest] = size
        self._claims[digest] += 1
        return True

    def unclaim(self, digest: str) -> None:
        assert self._claims[digest] > 0, "unclaimed more often than claimed"
        self._claims[digest] -= 1
        if not self._claims[digest]:
            del self._claims[digest]
            if digest not in self._adapters:
                del self._sizes[digest]

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

    def discard(self, digest: str) -> None:
        """Let the copy go though it is claimed: it cannot be used. Its claims keep the room."""
        if digest in self._adapters:
            self._evict(digest)

    def _make_room(self, size: int) -> bool:
        """Whether there is room for one more digest, unclaimed copies having gone for it if need be."""
        victims = self._victims(size)
        for victim in victims or ():
            self._evict(victim)
        return victims is not None

    def _victims(self, size: int) -> Sequence[str] | None:
        """The copies that must go for `size` more bytes; None when too many are claimed, or kept by pins."""
        victims: list[str] = []
        count, room = len(self._sizes), self._max_bytes - sum(self._sizes.values())

        def fits() -> bool:
            return count < self._max_adapters and (not self._max_bytes or size <= room)

        idle = [digest for digest in self._adapters if digest not in self._claims]
        free = [digest for digest in idle if digest not in self.pinned]
        candidates = free
        if self._sizes.keys() - free <= self.pinned.keys():
            candidates = free + [digest for digest in idle if digest in self.pinned]
        for digest in candidates:
            if fits():
                break
            victims.append(digest)
            count, room = count - 1, room + self._sizes[digest]
        return victims if fits() else None

    def _evict(self, digest: str) -> None:
        self._on_evict(digest)
        del self._adapters[digest]
        if digest not in self._claims:
            del self._sizes[digest]

    def check_integrity(self) -> None:
        """Raise AssertionError when there are more digests or bytes than room."""
        assert self._sizes.keys() == self._adapters.keys() | self._claims.keys(), "room is lost, or taken by nobody"
        assert len(self._sizes) <= self._max_adapters, "host memory is overcommitted"
        assert not self._max_bytes or sum(self._sizes.values()) <= self._max_bytes, "host memory is overcommitted"
        assert all(count > 0 for count in self._claims.values())
