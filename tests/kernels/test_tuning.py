"""The table of tuned block sizes: what it answers, what it refuses, and that the kernels read it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lora_kernels import tuning
from lora_kernels.tuning import TABLE, entries, tuned
from tests.kernels.path_contract import MIXED_RANKS, MIXED_ROWS, QKV, check
from tests.kernels.pool_builder import build_pool

CPU = torch.device("cpu")
ENTRY: dict[str, Any] = {
    "kernel": "shrink",
    "device": "cpu",
    "dtype": "float32",
    "shape": [77, 3],
    "sums": {"block_k": 16, "splits": 3},
    "dealing": {"16": {"programs": 2}, "128": {"programs": 5, "num_warps": 4}},
    "chosen_by": {},
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps([ENTRY, {**ENTRY, "kernel": "expand", "shape": QKV, "sums": {}}]))
    monkeypatch.setattr(tuning, "TABLE", path)
    return path


@pytest.mark.usefixtures("table")
def test_the_next_larger_batch_that_was_measured() -> None:
    sums = ENTRY["sums"]
    for rows, dealing in ((1, "16"), (16, "16"), (17, "128"), (4096, "128")):
        assert tuned("shrink", CPU, torch.float32, (77, 3), rows) == {**sums, **ENTRY["dealing"][dealing]}


@pytest.mark.usefixtures("table")
def test_nothing_where_nothing_was_measured() -> None:
    assert tuned("shrink", CPU, torch.float16, (77, 3), 16) == {}
    assert tuned("shrink", CPU, torch.float32, (77, 2), 16) == {}


@pytest.mark.parametrize("bad", [[ENTRY, ENTRY], [{**ENTRY, "dealing": {}}]])
def test_a_contradictory_table_is_refused(tmp_path: Path, bad: list[object]) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(ValueError, match="two entries"):
        entries(path)


@pytest.mark.usefixtures("table")
def test_the_kernels_launch_with_it_and_compute_the_same(triton_path: ModuleType) -> None:
    pool = build_pool(MIXED_RANKS, 77, QKV)
    y, x = pool.inputs(len(MIXED_ROWS))
    assert triton_path.triton_shrink.blocks_of(x, 3) == triton_path.triton_shrink.ShrinkBlocks(16, 3, programs=2)
    assert triton_path.triton_expand.blocks_of(y, QKV).programs == 2
    check(triton_path.apply_lora_triton, pool, MIXED_ROWS)


def test_the_checked_in_table_holds_what_the_kernels_take(triton_path: ModuleType) -> None:
    """Launch constants of a known kernel, in warps and stages that are powers of two and few; sums are shrink's."""
    blocks = {"shrink": triton_path.triton_shrink.ShrinkBlocks, "expand": triton_path.triton_expand.ExpandBlocks}
    defaults = {"shrink": {"block_k": 128, "splits": 4}, "expand": {}}
    for entry in entries(TABLE):
        kernel = entry["kernel"]
        assert set(entry["sums"]) == set(defaults[kernel])
        assert set(entry["dealing"]) == set(entry["chosen_by"]["us"])
        for dealing in entry["dealing"].values():
            assert not set(dealing) & set(entry["sums"])
            assert blocks[kernel](**{**entry["sums"], **dealing}).num_warps in (1, 2, 4, 8)
