"""Fewer launches, in the interpreter: the same values as the default's, each row's bits its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import BASE_ROW
from lora_kernels.errors import MixedDtypes, NotContiguous, ShapeMismatch
from tests.kernels.path_contract import DTYPES, MIXED_RANKS, MIXED_ROWS, QKV
from tests.kernels.pool_builder import Pool, assert_close, bits, build_pool, poison

EPS = 1e-5
WIDTH = 1100
"""Wide enough for two parts of shrink's sum and two chunks of the produced input."""

Produced = Callable[[Pool, Tensor, list[int]], tuple[Tensor, Tensor, Tensor]]


@pytest.fixture
def fused(interpreted: dict[str, ModuleType]) -> ModuleType:
    return interpreted["triton_fused"]


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """As Llama does it: rounded before the gain."""
    return gain * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


@pytest.fixture(params=["norm", "silu"])
def produced(request: pytest.FixtureRequest, fused: ModuleType) -> Produced:
    """Runs a fused producer on random input: what it produced, what it should have, and shrunk."""

    def run(pool: Pool, source: Tensor, row_slots: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        batch = pool.batch(row_slots)
        width = source.shape[1] // 2
        if request.param == "silu":
            made, shrunk = fused.silu_shrink(source, pool.weights, batch)
            return made, F.silu(source[:, :width]) * source[:, width:], shrunk
        x = source[:, :width]  # rows apart
        gain = torch.linspace(-1.0, 2.0, width).to(x.dtype)
        made, shrunk = fused.norm_shrink(x, gain, EPS, pool.weights, batch)
        return made, rms_norm(x, gain), shrunk

    return run


def source_of(rows: int, dtype: torch.dtype, seed: int = 3) -> Tensor:
    return torch.randn(rows, 2 * WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_producer_and_shrink_are_what_two_launches_give(
    produced: Produced, triton_path: ModuleType, dtype: torch.dtype
) -> None:
    pool, row_slots = build_pool([[17], [0], [5]], WIDTH, [20], dtype), [0, BASE_ROW, 2, 1, 0]
    made, expected, shrunk = produced(pool, source_of(len(row_slots), dtype), row_slots)
    assert_close(made, expected.double())

    y, _ = pool.inputs(len(row_slots))
    apart = y.clone()
    triton_path.expand(y, shrunk, pool.weights, pool.batch(row_slots))
    triton_path.apply_lora_triton(apart, made, pool.weights, pool.batch(row_slots))
    assert bits(y).equal(bits(apart))


def test_base_rows_are_produced_without_adapters(produced: Produced) -> None:
    pool = build_pool([[3]], WIDTH, [20])
    made, expected, _ = produced(pool, source_of(20, torch.float32), [BASE_ROW] * 20)
    assert_close(made, expected.double())
    made, _, _ = produced(pool, source_of(0, torch.float32), [])
    assert made.shape == (0, WIDTH)


def linear(fused: ModuleType, triton_path: ModuleType, pool: Pool, x: Tensor, row_slots: list[int]) -> Tensor:
    weight = weight_of(pool)
    batch = pool.batch(row_slots)
    shrunk = triton_path.empty_shrunk(x, pool.weights, triton_path.work_of(batch)).fill_(math.nan)
    triton_path.shrink(shrunk, x, pool.weights, batch)
    y: Tensor = fused.linear_expand(x, weight, shrunk, pool.weights, batch)
    return y


def weight_of(pool: Pool) -> Tensor:
    width = pool.weights.a.shape[2]
    values = torch.randn(sum(pool.out_sizes), width, generator=torch.Generator().manual_seed(5))
    return (values / width**0.5).to(pool.weights.a.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_slots", [MIXED_ROWS, [BASE_ROW] * 3, [1] * 17 + [0, BASE_ROW], []])
def test_linear_and_adapters_in_one_launch(
    fused: ModuleType, triton_path: ModuleType, dtype: torch.dtype, row_slots: list[int]
) -> None:
    pool = build_pool(MIXED_RANKS, 150, QKV, dtype)
    _, x = pool.inputs(len(row_slots))
    base = x.double() @ weight_of(pool).double().T
    assert_close(linear(fused, triton_path, pool, x, row_slots), pool.reference(base, x, row_slots))


def test_a_row_of_one_launch_has_its_bits_in_every_batch(fused: ModuleType, triton_path: ModuleType) -> None:
    pool = build_pool(MIXED_RANKS, 150, QKV, torch.bfloat16)
    row_slots = MIXED_ROWS * 2  # slots' tiles across the borders of the linear's
    _, x = pool.inputs(len(row_slots))
    together = linear(fused, triton_path, pool, x, row_slots)
    for row in (0, 1, 6, 13):
        alone = linear(fused, triton_path, pool, x[row : row + 1], [row_slots[row]])
        assert bits(alone[0]).equal(bits(together[row]))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy, at our inf
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_neighbours_inf_or_nan_changes_no_bit_of_one_launch(
    fused: ModuleType, triton_path: ModuleType, value: float
) -> None:
    pool = build_pool(MIXED_RANKS, 40, QKV)
    _, x = pool.inputs(len(MIXED_ROWS))
    well = linear(fused, triton_path, pool, x, MIXED_ROWS)
    poison(pool, 3, value)
    hurt = linear(fused, triton_path, pool, x, MIXED_ROWS)
    others = [row for row, slot in enumerate(MIXED_ROWS) if slot != 3]
    assert bits(hurt[others]).equal(bits(well[others]))


def test_bad_tensors_are_refused(fused: ModuleType) -> None:
    pool = build_pool(MIXED_RANKS, 40, QKV)
    _, x = pool.inputs(2)
    batch, gain = pool.batch([0, 1]), torch.ones(40)
    with pytest.raises(MixedDtypes):
        fused.norm_shrink(x, gain.half(), EPS, pool.weights, batch)
    with pytest.raises(ShapeMismatch, match="gain"):
        fused.norm_shrink(x, gain[1:], EPS, pool.weights, batch)
    with pytest.raises(NotContiguous):
        fused.norm_shrink(x.T.contiguous().T, gain, EPS, pool.weights, batch)
    with pytest.raises(ShapeMismatch, match="gate_up"):
        fused.silu_shrink(x, pool.weights, batch)
    with pytest.raises(ShapeMismatch, match="weight"):
        fused.linear_expand(x, torch.ones(sum(QKV), 41), torch.empty(3, 1, 2, 64), pool.weights, batch)
    with pytest.raises(ShapeMismatch, match="shrunk"):
        fused.linear_expand(x, weight_of(pool), torch.empty(3, 1, 1, 64), pool.weights, batch)
