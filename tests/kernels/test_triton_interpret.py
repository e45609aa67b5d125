"""The Triton path against the reference, in Triton's interpreter: what is computed, not how fast.

Bitwise claims hold here because NumPy multiplies blocks of one fixed shape row by row alike; a tensor core does too.
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

from lora_kernels import BASE_ROW, PAGE_ROWS
from tests.kernels.path_contract import DTYPES, MIXED_RANKS, MIXED_ROWS, QKV, Apply, PathContract
from tests.kernels.pool_builder import bits, build_pool, poison


class TestTritonPath(PathContract):
    @pytest.fixture
    def apply(self, triton_path: ModuleType) -> Apply:
        apply: Apply = triton_path.apply_lora_triton
        return apply


@pytest.fixture
def apply(triton_path: ModuleType) -> Apply:
    apply: Apply = triton_path.apply_lora_triton
    return apply


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_rows_and_missing_slices_keep_their_bits(apply: Apply, dtype: torch.dtype) -> None:
    pool = build_pool(MIXED_RANKS, 40, QKV, dtype)
    y, x = pool.inputs(len(MIXED_ROWS))
    y[1] = torch.nan
    y[:, ::5] = -0.0  # the one value that adding nothing would change
    before = bits(y.clone()).split(QKV, dim=1)
    apply(y, x, pool.weights, pool.batch(MIXED_ROWS))
    for index, after in enumerate(bits(y).split(QKV, dim=1)):
        for row, slot in enumerate(MIXED_ROWS):
            has_slice = slot != BASE_ROW and MIXED_RANKS[slot][index] > 0
            assert after[row].equal(before[index][row]) != has_slice


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(apply: Apply, dtype: torch.dtype) -> None:
    """Alone, in a mixed batch, and as one of many rows of its adapter; an input wide enough for several parts."""
    pool = build_pool([[5, 33], [17, 0], [60, 16]], 2100, [40, 129], dtype)
    mixed = [2, 0, BASE_ROW, 1, 0, 2, 1]
    crowd = [0, 1, 2, 0] * 5
    y, x = pool.inputs(len(mixed))
    together = y.clone()
    apply(together, x, pool.weights, pool.batch(mixed))
    for row, slot in enumerate(mixed):
        alone = y[row : row + 1].clone()
        apply(alone, x[row : row + 1], pool.weights, pool.batch([slot]))
        assert bits(alone[0]).equal(bits(together[row]))

        crowd_y, crowd_x = pool.inputs(len(crowd) + 1, seed=row + 2)
        crowd_y[-1], crowd_x[-1] = y[row], x[row]
        apply(crowd_y, crowd_x, pool.weights, pool.batch([*crowd, slot]))
        assert bits(crowd_y[-1]).equal(bits(together[row]))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy, at our inf
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_neighbours_inf_or_nan_changes_no_bit(apply: Apply, value: float) -> None:
    pool = build_pool(MIXED_RANKS, 40, QKV)
    well, x = pool.inputs(len(MIXED_ROWS))
    hurt = well.clone()
    apply(well, x, pool.weights, pool.batch(MIXED_ROWS))
    poison(pool, 3, value)
    x[6] = value
    apply(hurt, x, pool.weights, pool.batch(MIXED_ROWS))
    others = [row for row, slot in enumerate(MIXED_ROWS) if slot != 3 and row != 6]
    assert bits(hurt[others]).equal(bits(well[others]))


def test_rows_past_the_rank_are_not_read_as_data(apply: Apply) -> None:
    pool = build_pool(MIXED_RANKS, 40, QKV)
    clean, x = pool.inputs(len(MIXED_ROWS))
    tails_poisoned = clean.clone()
    apply(clean, x, pool.weights, pool.batch(MIXED_ROWS))
    for slot, ranks in enumerate(MIXED_RANKS):
        for index, rank in enumerate(ranks):
            if tail := rank % PAGE_ROWS:
                last = pool.table.pages[index][slot][-1] * PAGE_ROWS
                pool.weights.a[index, last + tail : last + PAGE_ROWS] = math.nan
                pool.weights.b[index][last + tail : last + PAGE_ROWS] = math.nan
    apply(tails_poisoned, x, pool.weights, pool.batch(MIXED_ROWS))
    assert tails_poisoned.equal(clean)


def test_expand_reads_only_what_shrink_wrote(triton_path: ModuleType) -> None:
    pool = build_pool(MIXED_RANKS, 40, QKV)
    batch = pool.batch(MIXED_ROWS)
    y, x = pool.inputs(len(MIXED_ROWS))
    expected = y.clone()
    triton_path.apply_lora_triton(expected, x, pool.weights, batch)
    shrunk = torch.full((len(QKV), 1, len(MIXED_ROWS), 4 * PAGE_ROWS), math.nan)
    triton_path.shrink(shrunk, x, pool.weights, batch)
    triton_path.expand(y, shrunk, pool.weights, batch)
    assert y.equal(expected)


def test_strided_rows(apply: Apply) -> None:
    """y and x may be columns of something wider."""
    pool = build_pool(MIXED_RANKS, 40, QKV)
    y, x = pool.inputs(len(MIXED_ROWS))
    wide_y, wide_x = torch.zeros(len(y), y.shape[1] + 9), torch.zeros(len(x), x.shape[1] + 5)
    wide_y[:, : y.shape[1]], wide_x[:, 3:43] = y, x
    apply(y, x, pool.weights, pool.batch(MIXED_ROWS))
    apply(wide_y[:, : y.shape[1]], wide_x[:, 3:43], pool.weights, pool.batch(MIXED_ROWS))
    assert wide_y[:, : y.shape[1]].equal(y)
    assert not wide_y[:, y.shape[1] :].any()


def test_work_list_is_built_once_for_all_layers(apply: Apply) -> None:
    first, second = build_pool(MIXED_RANKS, 20, QKV), build_pool(MIXED_RANKS, 20, QKV)
    batch = first.batch(MIXED_ROWS)
    y, x = first.inputs(len(MIXED_ROWS))
    apply(y, x, first.weights, batch)
    work = batch.work
    apply(y, x, second.weights, batch)
    assert work is not None and batch.work is work
