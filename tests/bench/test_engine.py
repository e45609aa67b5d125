"""The engine's benchmark runs on both paths, and says what it must; no times are tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.bench.engine.__main__ import Sizes, run

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
        assert line["metrics"]["read_gb_per_s"] > 0
    assert lines[2]["metrics"]["adapter_bytes"] == 2 * lines[1]["metrics"]["adapter_bytes"]
