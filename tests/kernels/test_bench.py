"""The kernel benchmarks: their programs in Triton's interpreter, and what they make of figures, which are made up here.

No program here times anything: a time from the interpreter says nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.bench.cases import LLAMA_8B, Case, adapter_bytes, cases
from kernels.bench.gates import engine_gates, gates, table
from kernels.bench.tune import Candidate, choose
from lora_kernels.tuning import TABLE

ROOT = Path(__file__).resolve().parents[2]
TERABYTE = 1e12


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: whether Triton interprets or compiles is one switch for all of a process.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    command = [sys.executable, "-W", "error", "-m", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_benchmark_runs_in_the_interpreter_and_shows_no_time() -> None:
    done = run("kernels.bench.lora", "--device", "cpu", "--peers", "none")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["setup"]["segments"] for line in lines} == {False, True}
    assert all(line["metrics"] == {"checked": ["ours", "linear_expand"]} for line in lines)


def test_tuning_runs_in_the_interpreter_and_writes_nothing() -> None:
    before = TABLE.read_bytes()
    done = run("kernels.bench.tune", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["kernel"] for line in done.stdout.splitlines()} == {"shrink", "expand"}
    assert TABLE.read_bytes() == before


def test_without_a_gpu_it_says_so_and_fails() -> None:
    done = run("kernels.bench.lora", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no CUDA GPU" in done.stderr
    assert done.stdout == ""


def test_the_floor_is_the_bytes_of_the_distinct_adapters() -> None:
    """83.9 MB for one r=16 adapter of all 32 layers, in bf16."""
    assert 32 * adapter_bytes(LLAMA_8B, Case(64, 1, (16,)), torch.bfloat16) == 83_886_080
    assert Case(64, 16, (8, 16, 32, 64)).sum_of_ranks == 4 * 120
    zipf = Case(64, 16, (8,), "zipf")
    assert zipf.sum_of_ranks == 8 * len(set(zipf.row_slots)) < 8 * 16
    assert Case(40, 3, (8,), segments=True).row_slots == sorted(Case(40, 3, (8,)).row_slots)


def test_the_cases_reach_what_the_gates_ask_for() -> None:
    for quick in (False, True):
        found = list(cases(quick))
        assert len(set(found)) == len(found)
        assert {case.rows for case in found} >= {1, 64, 512}
        assert any(case.sum_of_ranks >= 512 and not case.segments for case in found)


def result(case: Case, ours: float, **peers: float) -> Mapping[str, Any]:
    """A line as the benchmark writes it: microseconds alone; extra is twice as much."""

    def measured(alone: float) -> dict[str, Any]:
        return {"alone_us": [alone, alone, alone], "extra_us": 2 * alone, "host_us": 30.0}

    setup = {
        "rows": case.rows,
        "adapters": case.adapters,
        "ranks": list(case.ranks),
        "sum_of_ranks": case.sum_of_ranks,
        "popularity": case.popularity,
        "segments": case.segments,
        "adapter_bytes": adapter_bytes(LLAMA_8B, case, torch.bfloat16),
    }
    return {"setup": setup, "metrics": {name: measured(us) for name, us in {"ours": ours, **peers}.items()}}


def test_gates_are_of_the_worst_case() -> None:
    many = Case(64, 16, (64,))
    mixed = Case(64, 16, (8, 16, 32, 64))
    us_of_many = 1e6 * adapter_bytes(LLAMA_8B, many, torch.bfloat16) / TERABYTE / 0.65  # 65 % of what a copy reaches
    us_of_mixed = 1.2 * us_of_many * mixed.sum_of_ranks / many.sum_of_ranks
    results = [
        result(Case(1, 1, (16,)), 1.0, vllm=4.0),
        result(Case(4, 1, (16,)), 8.0, vllm=7.0),
        result(many, us_of_many, vllm=1e6),
        result(mixed, us_of_mixed, vllm=1e6),
    ]
    seen = {gate.name.partition(",")[0]: (gate.seen, gate.verdict) for gate in gates(results, TERABYTE)}
    assert seen["one r=16 adapter"] == (16.0, "MISSED")
    assert seen["sum of ranks >= 512"] == (pytest.approx(0.65), "gate")
    assert seen["mixed ranks over byte-proportional"] == (pytest.approx(1.2), "gate")
    assert seen["cases faster than vllm"] == (0.75, "MISSED")
    assert seen["ours over vllm"] == (8 / 7, "MISSED")
    assert seen["cases faster than sglang"] == (None, "not measured")
    assert seen["host work a step"] == (30.0, "aim")
    assert len(table(gates(results, TERABYTE)).splitlines()) == 1 + len(gates(results, TERABYTE))


USUAL = Candidate((("splits", 4),), (("num_warps", 2),))
MORE_WARPS = USUAL._replace(dealing=(("num_warps", 4),))
TWO_SPLITS = Candidate((("splits", 2),), (("num_warps", 2),))


def test_tuning_chooses_sums_for_all_batches_and_the_rest_for_each() -> None:
    times = {16: {USUAL: 10.0, MORE_WARPS: 9.0, TWO_SPLITS: 5.0}, 64: {USUAL: 10.0, MORE_WARPS: 12.0, TWO_SPLITS: 11.0}}
    assert choose(times, USUAL) == (TWO_SPLITS.sums, {16: TWO_SPLITS.dealing, 64: TWO_SPLITS.dealing})
    times = {16: {USUAL: 10.0, MORE_WARPS: 9.0, TWO_SPLITS: 8.0}, 64: {USUAL: 10.0, MORE_WARPS: 12.0, TWO_SPLITS: 12.0}}
    assert choose(times, USUAL) == (USUAL.sums, {16: MORE_WARPS.dealing, 64: USUAL.dealing})


def test_tuning_keeps_the_default_where_a_gain_is_noise() -> None:
    times = {16: {USUAL: 10.0, MORE_WARPS: 9.9, TWO_SPLITS: 9.85}}
    assert choose(times, USUAL) == (USUAL.sums, {16: USUAL.dealing})


def test_the_engines_gates_take_the_worst_of_what_they_are_about() -> None:
    def line(case: str, metrics: dict[str, float], **setup: int) -> dict[str, Any]:
        return {"setup": {"case": case, **setup}, "metrics": metrics}

    results = [
        line("decode", {"seconds": 4.0, "weights_floor_seconds": 3.0}, batch=1, adapters=0, rank=16),
        line("decode", {"of_base": 0.99}, batch=1, adapters=1, rank=16),
        line("decode", {"of_base": 0.9}, batch=64, adapters=1, rank=16),
        line("decode", {"of_base": 0.5}, batch=64, adapters=1, rank=64),
        line("decode", {"of_base": 0.8}, batch=64, adapters=16, rank=16),
        line("load", {"seconds": 0.0017}, rank=16),
        line("loading", {"p99_of_quiet": 1.04}, batch=64, adapters=1, rank=16),
    ]
    found = engine_gates(results)
    assert [each.verdict for each in found] == ["gate", "MISSED", *["not measured"] * 2, "MISSED", "aim", "gate"]
    assert [each.seen for each in found if each.seen] == pytest.approx([0.9, 0.8, 4 / 3, 1.7, 1.04])
