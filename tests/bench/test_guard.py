"""The guard's benchmark, in little: every figure is there."""

from __future__ import annotations

from pathlib import Path

from services.bench import guard


def test_every_figure_is_there(tmp_path: Path) -> None:
    resolves, look_ups = guard.run(tmp_path, calls=32, rounds=1)
    assert resolves.metrics["ratios"].keys() == {"token", "token_tls"}
    assert all(each["low"] > 0 for each in (*resolves.metrics["ratios"].values(), look_ups.metrics["ratio"]))
