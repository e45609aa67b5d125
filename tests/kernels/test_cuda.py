"""The kernels on a CUDA GPU, compiled: what the interpreter's tests ask of them, and what only a GPU can show.

`make test-gpu` runs these; everywhere else they are skipped.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lora_kernels import BASE_ROW, ActiveSet, LoraBatch, LoraInputError, LoraWeights, PageTable, WorkList, apply_lora
from tests.kernels.path_contract import MIXED_RANKS, MIXED_ROWS, QKV, Apply, PathContract
from tests.kernels.pool_builder import bits, build_pool
from tests.kernels.test_capture import BATCHES, ROWS
from tests.kernels.test_triton_interpret import (  # noqa: F401 -- run here with this module's `apply`
    test_a_neighbours_inf_or_nan_changes_no_bit,
    test_a_row_has_the_same_bits_in_every_batch,
    test_base_rows_and_missing_slices_keep_their_bits,
    test_rows_past_the_rank_are_not_read_as_data,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; `make test-gpu` where there is one"),
]


def weights_on_gpu(weights: LoraWeights) -> LoraWeights:
    b = tuple(each.cuda() for each in weights.b)
    return LoraWeights(weights.group, weights.a.cuda(), b, weights.ranks.cuda(), weights.scales.cuda())


def batch_on_gpu(batch: LoraBatch, work: WorkList | None = None) -> LoraBatch:
    tables = {
        name: PageTable(table.table.cuda(), table.pages, table.rows_per_slice)
        for name, table in batch.active.tables.items()
    }
    return LoraBatch(batch.row_slots.cuda(), ActiveSet(batch.active.slots, tables, batch.active.most_pages), work)


def apply_on_gpu(y: Tensor, x: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """`apply_lora` for tensors of the host, which go to the GPU and back."""
    on_gpu = y.cuda()
    apply_lora(on_gpu, x.cuda(), weights_on_gpu(weights), batch_on_gpu(batch))
    y.copy_(on_gpu)


@pytest.fixture
def apply() -> Apply:
    return apply_on_gpu


class TestOnGpu(PathContract):
    @pytest.fixture
    def apply(self) -> Apply:
        return apply_on_gpu


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Any call that waits for the device raises, where torch knows of it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_graph_serves_every_mix(dtype: torch.dtype) -> None:
    """Captured over a batch of the base model alone; its replays have the bits of each batch's own launches."""
    from lora_kernels.triton_work_list import build_work_list

    pool = build_pool(MIXED_RANKS, 40, QKV, dtype)
    weights = weights_on_gpu(pool.weights)
    y, x = (each.cuda() for each in pool.inputs(ROWS))
    work = WorkList.allocate(ROWS, len(MIXED_RANKS), 4, y.device)
    captured = batch_on_gpu(pool.batch([BASE_ROW] * ROWS), work)
    result = y.clone()

    def step() -> None:
        build_work_list(work)
        result.copy_(y)
        apply_lora(result, x, weights, captured)

    pages = pool.batch(range(len(MIXED_RANKS))).active.pages_of_slot
    assert work.stage([BASE_ROW] * ROWS, pages)
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    made = random.Random(0)
    mixes = [[made.randint(BASE_ROW, len(MIXED_RANKS) - 1) for _ in range(ROWS)] for _ in range(20)]
    for row_slots in [*BATCHES, *mixes]:
        assert work.stage(row_slots, pages)
        graph.replay()
        padded = row_slots + [BASE_ROW] * (ROWS - len(row_slots))
        own = y.clone()
        apply_lora(own, x, weights, batch_on_gpu(pool.batch(padded)))
        assert bits(result).equal(bits(own)), row_slots


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_step_does_not_wait_for_the_device() -> None:
    from lora_kernels.triton_work_list import build_work_list

    pool = build_pool(MIXED_RANKS, 40, QKV)
    weights, (y, x) = weights_on_gpu(pool.weights), (each.cuda() for each in pool.inputs(len(MIXED_ROWS)))
    work = WorkList.allocate(len(MIXED_ROWS), len(MIXED_RANKS), 4, y.device)
    batch = batch_on_gpu(pool.batch(MIXED_ROWS), work)
    pages = batch.active.pages_of_slot
    with waiting_is_an_error():
        for _ in range(2):
            assert work.stage(MIXED_ROWS, pages)
            build_work_list(work)
            apply_lora(y, x, weights, batch)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_capturing_without_fixed_buffers_is_refused() -> None:
    pool = build_pool(MIXED_RANKS, 40, QKV)
    weights, (y, x) = weights_on_gpu(pool.weights), (each.cuda() for each in pool.inputs(1))
    batch = batch_on_gpu(pool.batch([0]))
    with pytest.raises(LoraInputError, match="fixed buffers"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        apply_lora(y, x, weights, batch)
