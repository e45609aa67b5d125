"""The scheduler's promises hold in a short simulation; `make bench-fairness` runs the long one."""

from __future__ import annotations

from services.bench.fairness import run


def test_waits_are_bounded_and_shares_follow_the_weights() -> None:
    result = run(1_500, seed=1, plot_path=None)
    assert {figure.name: figure.passed for figure in result.figures} == {
        "longest wait for a turn": True,
        "share of tokens beside weight, furthest off": True,
    }
    assert result.metrics["turns_passed"] > 100
