"""The arrows between an adapter's states: those drawn are counted, all others are bugs."""

from __future__ import annotations

import itertools

import pytest

from services.inference.adapters.states import ARROWS, AdapterState, Transitions, transition


def test_every_arrow_is_either_counted_or_refused() -> None:
    taken = Transitions()
    for current, target in itertools.product(AdapterState, AdapterState):
        if target in ARROWS[current]:
            assert transition(current, target, "a@1", taken) is target
            assert taken[current.name, target.name] == 1
        else:
            with pytest.raises(AssertionError, match=f"a@1: {current.name} → {target.name}"):
                transition(current, target, "a@1", taken)
    assert sum(taken.values()) == sum(map(len, ARROWS.values()))


def test_every_state_can_be_reached_and_left() -> None:
    assert set(ARROWS) == set(AdapterState)
    assert set().union(*ARROWS.values()) == set(AdapterState)
