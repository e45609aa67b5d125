"""The churn scenarios run and say what they must; no figure is tested, as machines differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.bench.churn.__main__ import SCENARIOS, run
from services.bench.churn.ground import Sizes

TINY = Sizes(rounds=1, prompts=6, input_len=4, output_len=8, seconds=0.5, registered=20, vocab_size=300)
FLAGS = ("--threads", "1", "--kv-cache-memory-bytes", str(64 << 20))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_every_scenario_runs_and_reports(tiny_model: Path) -> None:
    lines = {result.benchmark: json.loads(result.to_json()) for result in run(list(SCENARIOS), tiny_model, FLAGS, TINY)}
    assert list(lines) == [f"churn_{name}" for name in SCENARIOS]
    for line in lines.values():
        assert line["metrics"]["targets"]["failed requests"] == {"value": 0, "target": 0, "passed": True}
    assert set(lines["churn_cold"]["metrics"]["cold_tiers"]) == {"DISK"}
    assert lines["churn_moves"]["metrics"]["versions_met"] > 4
