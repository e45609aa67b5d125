"""What counts as other programs' work, in a file as Linux writes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.bench.quiet import busy_seconds, wait_until_idle


def test_idling_waiting_and_other_guests_are_no_work(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 900 50 5 6 70 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n")
    assert busy_seconds(stat) == pytest.approx(161 / os.sysconf("SC_CLK_TCK"))
    assert busy_seconds() > 0


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is never idle a measurement goes on, and can say so."""
    seconds = iter(range(1000))
    monkeypatch.setattr("services.bench.quiet.busy_seconds", lambda: 100.0 * next(seconds))
    assert not wait_until_idle(patience=0.5)
    monkeypatch.setattr("services.bench.quiet.busy_seconds", lambda: 0.0)
    assert wait_until_idle(patience=0.5)
