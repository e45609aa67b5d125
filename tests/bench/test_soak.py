"""The soak's driver runs against a real server for seconds; and what it calls flat."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.bench.churn.ground import Sizes
from services.bench.memory import Sample, growth, resident_bytes
from services.bench.soak import Pace, run


@pytest.mark.slow
def test_in_a_short_soak_nothing_fails(tiny_model: Path) -> None:
    sizes = Sizes(rounds=1, prompts=10, input_len=6, output_len=8, seconds=0, registered=0, vocab_size=300)
    pace = Pace(move=0.1, load=0.1, cancel=0.05, patience=0.05, sample=0.2)
    flags = ("--threads", "1", "--kv-cache-memory-bytes", str(64 << 20))
    result = run(tiny_model, flags, sizes, seconds=3, pace=pace)
    failed, *_ = result.figures
    assert (failed.name, failed.value) == ("failed requests", 0), failed.note
    assert result.metrics["requests"] > 0
    assert result.metrics["failed_operations"] == {}
    assert set(result.metrics["operations"]) == {"alias move", "load", "unload", "cancel"}
    assert len(result.metrics["resident"]) > 5


@given(st.floats(-0.5, 0.5), st.integers(5, 40), st.integers(0, 4))
def test_growth_is_the_rise_of_the_line(rise: float, count: int, spikes: int) -> None:
    samples = [Sample(float(n), round(1e9 * (1 + rise * (n / (count - 1) - 0.5)))) for n in range(count)]
    assert growth(samples) == pytest.approx(rise, abs=1e-6)
    if count >= 30:
        for n in range(spikes):
            samples[7 * n] = Sample(float(7 * n), 3 * 10**9)
        assert growth(samples) == pytest.approx(rise, abs=0.2)


def test_a_process_of_its_own_is_resident() -> None:
    assert resident_bytes(os.getpid()) > 10_000_000
    assert resident_bytes(2**22) == 0
