"""The engine's benchmark runs on both paths, and says what it must; no times are tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.bench.engine.__main__ import run
from services.bench.engine.decode import Decode, Round, Sizes

TINY = Sizes(steps=1, rounds=1, batches=(1, 2), distinct=(1, 2), ranks=(8, 16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_measurement_is_there(tiny_model: Path, dtype: str) -> None:
    lines = [json.loads(result.to_json()) for result in run(tiny_model, TINY, backend="torch", dtype=dtype, threads=1)]
    assert [line["setup"]["benchmark"] for line in lines] == [
        "engine_memory",
        "engine_decode",
        "engine_decode",
        "engine_prefill",
    ]
    assert {line["setup"]["runner"] for line in lines} == {"ModelRunner"}
    for rank, line in zip((8, 16), lines[1:3], strict=True):
        assert line["setup"]["rank"] == rank
        assert set(line["metrics"]["step_ms"]) == {"1x0", "2x0", "1x1", "2x2", "2x1"}
        assert line["metrics"]["read_gb_per_s"]["low"] > 0
        assert set(line["metrics"]["step_over_weights"]) == {"1", "2"}
        assert set(line["metrics"]["extra_over_adapters"]) == {"1x1", "2x2", "2x1"}
    assert lines[2]["metrics"]["adapter_bytes"] == 2 * lines[1]["metrics"]["adapter_bytes"]


def test_eight_bits_are_measured_on_the_compiled_path(tiny_model: Path) -> None:
    found = run(tiny_model, TINY, backend="compiled", dtype="bfloat16", threads=1)
    decode, quality = (json.loads(result.to_json()) for result in found[-2:])
    assert decode["setup"]["benchmark"] == "engine_int8_decode"
    assert set(decode["metrics"]["over_dtype"]) == {"1x0", "1x1"}
    assert set(quality["metrics"]) == {"bfloat16", "int8", "targets"}
    assert quality["metrics"]["int8"]["greedy_agreement"] > 0.5


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that is twice as slow in one round, at everything, changes no ratio."""
    quick = Round(rate=10e9, steps={0: 0.030, 1: 0.032, 2: 0.034})
    slow = Round(quick.rate / 2, {distinct: 2 * seconds for distinct, seconds in quick.steps.items()})
    found = Decode({2: [quick, slow]}, weight_bytes=200_000_000, packed_bytes=150_000_000, adapter_bytes=10_000_000)
    assert found.over_weights(2) == pytest.approx([1.5, 1.5])
    assert found.over_adapters(2, 2) == pytest.approx([2, 2])
    assert found.over_one(2) == pytest.approx([34 / 32] * 2)
