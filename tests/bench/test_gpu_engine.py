"""The GPU engine's benchmark where there is no GPU: every case runs, on a tiny model, and says nothing of time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_case_runs_and_no_time_is_printed() -> None:
    command = [sys.executable, "-W", "error", "-m", "services.bench.engine.gpu", "--device", "cpu"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert Counter(line["setup"]["case"] for line in lines) == {
        "load": 2,
        "decode": 10,
        "prefill": 4,
        "growth": 4,
        "loading": 1,
    }
    assert all(line["metrics"] == {} for line in lines)
    assert {line["setup"]["rank"] for line in lines} == {8, 16}
    assert run.stderr.count("not measured") == 7
