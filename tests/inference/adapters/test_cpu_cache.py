"""A bounded number of copies: claimed ones stay, of the others the least recently used goes first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.adapters.cpu_cache import CpuCache
from tests.inference.adapters.packs import Pack


def filled(packs: dict[str, Pack], names: list[str], room: int, evicted: list[str] | None = None) -> CpuCache:
    """A cache with unclaimed copies, in order of use."""
    cache = CpuCache(room, (evicted if evicted is not None else []).append)
    for name in names:
        digest = packs[name].version.digest
        assert cache.try_claim(digest)
        cache.put(packs[name].adapter())
        cache.unclaim(digest)
    return cache


def test_the_least_recently_used_goes_first(packs: dict[str, Pack]) -> None:
    evicted: list[str] = []
    cache = filled(packs, ["rank-1", "rank-16", "rank-17"], 3, evicted)
    cache.touch(packs["rank-1"].version.digest)
    assert cache.try_claim("new")
    assert evicted == [packs["rank-16"].version.digest]
    assert packs["rank-16"].version.digest not in cache
    assert cache.get(packs["rank-1"].version.digest) is not None


def test_claims_keep_copies_and_room(packs: dict[str, Pack]) -> None:
    cache = filled(packs, ["rank-1", "rank-16"], 2)
    first, second = (packs[name].version.digest for name in ("rank-1", "rank-16"))
    assert cache.try_claim(first) and cache.try_claim(first) and cache.try_claim(second)
    assert not cache.try_claim("new")
    cache.unclaim(first)
    assert not cache.try_claim("new"), "the other claim keeps it"
    cache.unclaim(first)
    assert cache.try_claim("new")
    assert not cache.try_claim("newer"), "room is taken from the claim on, before the copy is there"


def test_a_copy_needs_a_claim(packs: dict[str, Pack]) -> None:
    with pytest.raises(AssertionError, match="claim"):
        CpuCache(2, lambda _: None).put(packs["rank-1"].adapter())


def test_unclaiming_once_too_often_is_found() -> None:
    cache = CpuCache(2, lambda _: None)
    cache.try_claim("x")
    cache.unclaim("x")
    with pytest.raises(AssertionError, match="more often"):
        cache.unclaim("x")


@given(
    operations=st.lists(st.tuples(st.sampled_from(["claim", "claim", "unclaim", "put", "touch"]), st.integers(0, 7)))
)
@settings(max_examples=60, deadline=None)
def test_never_more_than_there_is_room_for(packs: dict[str, Pack], operations: list[tuple[str, int]]) -> None:
    everyone = list(packs.values())
    evicted: list[str] = []
    cache, claims, copies = CpuCache(3, evicted.append), dict[str, int](), list[str]()
    for operation, index in operations:
        digest = everyone[index].version.digest
        if operation == "claim":
            before = len(evicted)
            fits = digest in {*claims, *copies} or len({*claims, *copies}) < 3 or bool(set(copies) - set(claims))
            assert cache.try_claim(digest) == fits
            if len(evicted) > before:
                (gone,) = evicted[before:]
                assert gone == next(copy for copy in copies if copy not in claims)
                copies.remove(gone)
            if fits:
                claims[digest] = claims.get(digest, 0) + 1
        elif operation == "unclaim" and digest in claims:
            cache.unclaim(digest)
            claims[digest] -= 1
            if not claims[digest]:
                del claims[digest]
        elif operation == "put" and digest in claims and digest not in copies:
            cache.put(everyone[index].adapter())
            copies.append(digest)
        elif operation == "touch" and digest in copies:
            cache.touch(digest)
            copies.remove(digest)
            copies.append(digest)
        cache.check_integrity()
        assert all((pack.version.digest in cache) == (pack.version.digest in copies) for pack in everyone)
        assert all(cache.is_claimed(pack.version.digest) == (pack.version.digest in claims) for pack in everyone)
