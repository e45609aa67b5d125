"""A short run of every fuzz target, with the same inputs each time; `make fuzz` looks longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import atheris  # noqa: F401 -- what the runs need; without it nothing here means anything
import pytest

from tests.fuzz.run import NAMES
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
RUNS = 10_000
MOST_SECONDS = 120


def test_every_target_has_a_name() -> None:
    assert set(NAMES) == set(TARGETS)


@pytest.mark.parametrize("name", NAMES)
def test_only_typed_errors(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.run", name, "--runs", str(RUNS), "--seconds", str(MOST_SECONDS)]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=2 * MOST_SECONDS,
        check=False,
    )
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert (done.returncode, found) == (0, {}), done.stdout[-2000:] + done.stderr[-4000:]
