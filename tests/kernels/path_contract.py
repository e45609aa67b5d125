"""What every way of applying LoRA must do. Each path's test module runs this class with its own `apply`."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels import BASE_ROW, LoraBatch, LoraWeights
from tests.kernels.pool_builder import Pool, assert_close, build_pool, poison

Apply = Callable[[Tensor, Tensor, LoraWeights, LoraBatch], None]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QKV = [50, 130, 13]
MIXED_RANKS = [[5, 13, 17], [33, 0, 1], [0, 64, 0], [16, 16, 16], [0, 0, 0]]
MIXED_ROWS = [1, BASE_ROW, 0, 3, 0, 4, 1, 2, BASE_ROW, 2]


def check(apply: Apply, pool: Pool, row_slots: list[int], active: list[int] | None = None) -> Tensor:
    """Apply to random inputs, compare with the reference, and return the result."""
    y, x = pool.inputs(len(row_slots))
    expected = pool.reference(y, x, row_slots)
    apply(y, x, pool.weights, pool.batch(row_slots, active))
    assert_close(y, expected)
    return y


@st.composite
def mixes(draw: st.DrawFn) -> tuple[Pool, list[int]]:
    out_sizes = draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    ranks_of_slot = st.lists(st.integers(0, 40), min_size=len(out_sizes), max_size=len(out_sizes))
    ranks = draw(st.lists(ranks_of_slot, min_size=1, max_size=5))
    rows = draw(st.lists(st.integers(BASE_ROW, len(ranks) - 1), min_size=1, max_size=24))
    pool = build_pool(
        ranks, draw(st.integers(1, 150)), out_sizes, draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 99))
    )
    return pool, rows


class PathContract:
    @pytest.fixture
    def apply(self) -> Apply:
        raise NotImplementedError("the path under test")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_mixed_ranks_and_subsets_of_slices(self, apply: Apply, dtype: torch.dtype) -> None:
        check(apply, build_pool(MIXED_RANKS, 77, QKV, dtype), MIXED_ROWS)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_rank_to_64_with_one_row_an_adapter(self, apply: Apply, dtype: torch.dtype) -> None:
        rows = list(range(64))
        random.Random(0).shuffle(rows)
        check(apply, build_pool([[rank] for rank in range(1, 65)], 40, [72], dtype), rows)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rank_512(self, apply: Apply, dtype: torch.dtype) -> None:
        check(apply, build_pool([[512], [3]], 33, [17], dtype), [0, 1, 0])

    @pytest.mark.parametrize(("width", "out"), [(1, 1), (7, 3), (64, 128), (129, 257), (1025, 40), (4097, 5)])
    def test_odd_sizes(self, apply: Apply, width: int, out: int) -> None:
        check(apply, build_pool([[5, 17], [16, 0]], width, [out, out + 1]), [0, 1, BASE_ROW, 0])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_prefill_segments_beside_decode_rows(self, apply: Apply, dtype: torch.dtype) -> None:
        check(apply, build_pool([[8], [20], [5]], 48, [96], dtype), [1] * 37 + [BASE_ROW] * 5 + [0] * 16 + [2, 1, 2])

    def test_more_active_adapters_than_rows_in_any_order(self, apply: Apply) -> None:
        check(apply, build_pool([[4 + slot, slot] for slot in range(7)], 24, [40, 8]), [5, 2], active=[6, 2, 0, 5, 3])

    def test_all_base_rows(self, apply: Apply) -> None:
        pool = build_pool(MIXED_RANKS, 20, QKV)
        for active in ([], [0, 3]):
            y, x = pool.inputs(20)
            before = y.clone()
            apply(y, x, pool.weights, pool.batch([BASE_ROW] * 20, active))
            assert y.equal(before)

    def test_no_rows(self, apply: Apply) -> None:
        check(apply, build_pool([[5]], 20, [30]), [], active=[0])

    def test_layer_with_fewer_ranks_than_the_adapter_has_pages(self, apply: Apply) -> None:
        pool = build_pool([[0, 5], [20, 16]], 30, [40, 24], pages_of_ranks=[[32, 17], [33, 16]])
        check(apply, pool, [0, 1, 1, BASE_ROW])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_cut_by_its_inputs_is_summed_before_it_is_expanded(self, apply: Apply, dtype: torch.dtype) -> None:
        pool = build_pool(MIXED_RANKS, 80, QKV, dtype)
        y, x = pool.inputs(len(MIXED_ROWS))
        expected = pool.reference(y, x, MIXED_ROWS)
        kept: list[Tensor] = []

        def apply_part(y: Tensor, part: slice, sum_shrunk: Callable[[Tensor], object]) -> None:
            batch = pool.batch(MIXED_ROWS)
            batch.sum_shrunk = sum_shrunk
            apply(y, x[:, part], dataclasses.replace(pool.weights, a=pool.weights.a[..., part].contiguous()), batch)

        apply_part(y.clone(), slice(48, 80), lambda shrunk: kept.append(shrunk.clone()))
        apply_part(y, slice(0, 48), lambda shrunk: shrunk.add_(kept.pop()))
        assert not kept
        assert_close(y, expected)

    @pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy, at our inf
    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_a_neighbours_inf_or_nan_stays_its_own(self, apply: Apply, value: float) -> None:
        pool = build_pool(MIXED_RANKS, 40, QKV)
        y, x = pool.inputs(len(MIXED_ROWS))
        expected = pool.reference(y, x, MIXED_ROWS)
        poison(pool, 3, value)
        x[6] = value
        apply(y, x, pool.weights, pool.batch(MIXED_ROWS))
        hurt = [row for row, slot in enumerate(MIXED_ROWS) if slot == 3 or row == 6]
        well = [row for row in range(len(MIXED_ROWS)) if row not in hurt]
        assert_close(y[well], expected[well])
        assert not y[hurt].isfinite().all(dim=1).any()

    @settings(
        max_examples=15,
        deadline=None,
        # Each path's class runs the same property on purpose; a fixture here is a function, with no state to reset.
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
    )
    @given(mix=mixes())
    def test_any_mix(self, apply: Apply, mix: tuple[Pool, list[int]]) -> None:
        check(apply, *mix)
