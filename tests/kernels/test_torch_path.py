"""The torch path against the reference."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.torch_path import apply_lora_torch
from tests.kernels.path_contract import MIXED_RANKS, MIXED_ROWS, QKV, Apply, PathContract
from tests.kernels.pool_builder import build_pool


class TestTorchPath(PathContract):
    @pytest.fixture
    def apply(self) -> Apply:
        return apply_lora_torch


def test_an_unchanged_active_set_gathers_once() -> None:
    pool = build_pool(MIXED_RANKS, 40, QKV)
    batch = pool.batch(MIXED_ROWS)
    y, x = pool.inputs(len(MIXED_ROWS))
    apply_lora_torch(y.clone(), x, pool.weights, batch)
    (gathered,) = batch.active.gathered.values()
    apply_lora_torch(y.clone(), x, pool.weights, batch)
    assert list(batch.active.gathered.values()) == [gathered]


def test_a_rows_own_overflow_is_its_answer() -> None:
    pool = build_pool([[4], [4]], 8, [6], torch.float16)
    pool.weights.scales[0, 1] = 1e9
    y, x = pool.inputs(2)
    apply_lora_torch(y, x, pool.weights, pool.batch([0, 1]))
    assert y[0].isfinite().all()
    assert y[1].isinf().any()
