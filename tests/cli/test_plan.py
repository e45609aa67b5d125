"""`multilora plan`, from samples in a file; tests/deploy asks a real Prometheus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.cli.usage import Sample, plan, write_samples
from tests.cli.conftest import run_cli


@pytest.mark.parametrize(
    ("used", "max_loras", "max_cpu_loras"),
    [
        ([(10, 3), (4, 4)], 6, 12),
        ([(1, 1)], 3, 3),  # as every resident adapter has its copy in memory
        ([(0, 7)], 9, 9),  # long requests: nothing began in the window
        ([(101, 20)], 22, 122),
    ],
)
def test_slots_for_the_peak_and_memory_for_the_window(
    used: list[tuple[int, int]], max_loras: int, max_cpu_loras: int
) -> None:
    wanted = plan(Sample(float(at), "a:8000", *each) for at, each in enumerate(used))
    assert (wanted.max_loras, wanted.max_cpu_loras) == (max_loras, max_cpu_loras)
    assert not wanted.blind


def test_the_busiest_replica_counts(tmp_path: Path) -> None:
    usage = tmp_path / "usage.jsonl"
    quiet = [Sample(60.0 * minute, "quiet:8000", 2, 1) for minute in range(9)]
    busy = [Sample(60.0 * minute, "busy:8000", 20 + minute, minute) for minute in range(9)]
    write_samples(usage, [*quiet, *busy])
    ended = run_cli("plan", "--from-metrics", str(usage), "--plot", str(tmp_path / "plan.png"))
    assert ended.returncode == 0, ended.stderr
    assert [line.split()[-1] for line in ended.stdout.splitlines()] == ["28", "8", "10", "34"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_what_had_no_series_is_said(tmp_path: Path) -> None:
    write_samples(tmp_path / "usage", [Sample(0.0, "a:8000", 5, 2, 40.0)])
    ended = run_cli("plan", "--from-metrics", str(tmp_path / "usage"), "--json")
    assert json.loads(ended.stdout)["blind"]
    assert "raise --metrics-top-adapters" in ended.stderr


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("", 3, "knows no request for an adapter"),
        ("not json\n", 4, "is no file that --save wrote"),
        ('{"at": 1}\n', 4, "is no file that --save wrote"),
        ("[1]\n", 4, "is no file that --save wrote"),
    ],
)
def test_files_that_hold_no_samples_are_refused(text: str, code: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "usage").write_text(text)
    ended = run_cli("plan", "--from-metrics", str(tmp_path / "usage"))
    assert (ended.returncode, ended.stderr.count("\n")) == (code, 1)
    assert says in ended.stderr


def test_a_prometheus_that_is_away_is_said() -> None:
    ended = run_cli("plan", "--from-metrics", "http://127.0.0.1:9")
    assert (ended.returncode, ended.stderr.count("\n")) == (5, 1)
    assert "http://127.0.0.1:9 does not answer" in ended.stderr
