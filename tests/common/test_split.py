"""How weighted aliases pick: shares, stickiness, and that a move of a tenth moves a tenth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.split import Target, pick

KEYS = [f"user-{number}" for number in range(10_000)]


def picked(*weights: tuple[int, int], keys: list[str] = KEYS) -> list[int]:
    targets = [Target(*weight) for weight in weights]
    return [pick(targets, "acme/x:stable", key) for key in keys]


def test_ninety_to_eighty_moves_a_tenth() -> None:
    before, after = picked((1, 90), (2, 10)), picked((1, 80), (2, 20))
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {(1, 2)}
    assert len(moved) == pytest.approx(1000, rel=0.15)
    assert before.count(2) == pytest.approx(1000, rel=0.15)


@given(st.integers(0, 100), st.integers(0, 100))
def test_only_what_must_moves(first: int, second: int) -> None:
    low, high = sorted((first, second))
    for old, new in zip(
        picked((1, 1 + low), (2, 101 - low), keys=KEYS[:300]),
        picked((1, 1 + high), (2, 101 - high), keys=KEYS[:300]),
        strict=True,
    ):
        assert (old, new) != (1, 2)


@given(st.permutations([(1, 5), (2, 3), (7, 2)]), st.text())
def test_the_order_given_does_not_matter(weights: list[tuple[int, int]], key: str) -> None:
    targets = [Target(*weight) for weight in weights]
    if key:
        assert pick(targets, "a/b:c", key) == pick(sorted(targets), "a/b:c", key)
    assert pick(targets, "a/b:c", key) in {1, 2, 7}


def test_the_same_everywhere_for_ever() -> None:
    """Replicas of other releases pick too, so these may not change."""
    assert picked((1, 50), (2, 30), (3, 20))[:12] == [2, 1, 1, 2, 1, 1, 3, 1, 1, 1, 1, 1]


def test_aliases_split_apart() -> None:
    targets = [Target(1, 50), Target(2, 50)]
    assert [pick(targets, "a/b:c", key) for key in KEYS[:50]] != [pick(targets, "a/b:d", key) for key in KEYS[:50]]


def test_without_a_key_it_is_by_chance() -> None:
    assert {pick([Target(1), Target(2)], "a/b:c", "") for _ in range(100)} == {1, 2}
    assert pick([Target(4, 9)], "a/b:c", "") == 4
