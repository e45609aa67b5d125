"""The Triton path: a shrink and an expand per linear group, straight from the rank pages.

A row's result is bitwise the same in every batch: tiles, blocks and the parts of a sum are fixed by the layer and by
the row's own rank, sums run in one order, and nothing is added atomically. Rows of the base model are in no tile.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lora_kernels import triton_expand, triton_shrink, triton_work_list
from lora_kernels.errors import MixedDtypes, NotContiguous, ShapeMismatch
from lora_kernels.layout import PAGE_ROWS, LoraBatch, LoraWeights
from lora_kernels.work_list import TILE_ROWS, WorkList, check_rows

PROGRAMS = 528
"""Programs that share a work list: four for each multiprocessor of an H200. A batch with fewer tiles leaves the rest to
return at once. How the work is dealt changes no bit. Reasoned, not yet measured."""


def apply_lora_triton(y: Tensor, x: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """Add each row's adapter to `y` in place, in two launches and without waiting for the device.

    Semantics:
        for row i with slot s >= 0, for each slice t that s has:
            y[i, slice t] += (scale[t, s] * x[i] @ A[t, s].T) @ B[t, s]      accumulated in float32
    Shape:
        y: [rows, sum of out]   x: [rows, in], both of the pool's dtype; a row's values lie side by side
    Raises a `LoraInputError` before anything is launched.
    """
    check_launch(y, x, weights)
    if not x.shape[0]:
        return
    work = work_of(batch)
    check_rows(work, x.shape[0])
    splits = triton_shrink.splits_of(x.shape[1])
    # Never filled: expand reads only what shrink wrote.
    shrunk = torch.empty(
        weights.slices, splits, x.shape[0], work.max_pages * PAGE_ROWS, dtype=torch.float32, device=x.device
    )
    shrink(shrunk, x, weights, batch)
    if batch.sum_shrunk is not None:
        batch.sum_shrunk(shrunk)
    expand(y, shrunk, weights, batch)


def check_launch(y: Tensor, x: Tensor, weights: LoraWeights) -> None:
    """Raise MixedDtypes, NotContiguous or ShapeMismatch unless the kernels can take these."""
    dtypes = {"y": y.dtype, "x": x.dtype, "the pool": weights.a.dtype}
    if len(set(dtypes.values())) > 1 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise MixedDtypes(f"y, x and the pool share one of float32, float16 and bfloat16; they are {dtypes}")
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise NotContiguous(f"the values of a row lie side by side; y steps {y.stride(1)}, x steps {x.stride(1)}")
    expected = (x.shape[0], sum(b.shape[1] for b in weights.b)), (x.shape[0], weights.a.shape[2])
    if (tuple(y.shape), tuple(x.shape)) != expected:
        raise ShapeMismatch(f"y and x are {tuple(y.shape)} and {tuple(x.shape)}, expected {expected}")


def work_of(batch: LoraBatch) -> WorkList:
    """The batch's work list; without fixed buffers it is made and built by the first layer that asks."""
    if batch.work is None:
        pages = batch.active.pages_of_slot
        rows = batch.row_slots.numel()
        work = WorkList.allocate(rows, len(pages), max(1, *pages), batch.row_slots.device)
        work.packed[:rows] = batch.row_slots
        work.packed[rows:] = torch.tensor(pages, dtype=torch.int32)
        triton_work_list.build_work_list(work)
        batch.work = work
    return batch.work


def shrink(shrunk: Tensor, x: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """Launch `shrink_kernel`.   shrunk: [slices, splits, rows, most pages * PAGE_ROWS] float32"""
    work = work_of(batch)
    table = batch.active.tables[weights.group].table
    splits, rank_columns = shrunk.shape[1], shrunk.shape[3]
    grid = (min(PROGRAMS, work.items.shape[1]), weights.slices * splits)
    triton_shrink.shrink_kernel[grid](
        x,
        weights.a,
        shrunk,
        work.order,
        work.tiles,
        work.items,
        work.counts,
        table,
        weights.ranks,
        x.shape[1],
        x.stride(0),
        weights.a.shape[1],
        table.shape[1],
        table.shape[2],
        rank_columns,
        shrunk.stride(1),
        work.tiles.shape[1],
        work.items.shape[1],
        SPLITS=splits,
        TILE_ROWS=TILE_ROWS,
        PAGE_ROWS=PAGE_ROWS,
        BLOCK_K=triton_shrink.block_k_of(x.dtype),
        **triton_shrink.LAUNCH,
    )


def expand(y: Tensor, shrunk: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """Launch `expand_kernel`.   shrunk: what `shrink` wrote"""
    work = work_of(batch)
    table = batch.active.tables[weights.group].table
    absent = triton_expand.MOST_SLICES - weights.slices
    out_sizes = [b.shape[1] for b in weights.b]
    blocks = sum(triton.cdiv(out, triton_expand.BLOCK_N) for out in out_sizes)
    triton_expand.expand_kernel[(min(PROGRAMS, work.tiles.shape[1]), blocks)](
        y,
        shrunk,
        *weights.b,
        *[weights.b[0]] * absent,
        work.order,
        work.tiles,
        work.counts,
        table,
        weights.ranks,
        weights.scales,
        y.stride(0),
        *out_sizes,
        *[0] * absent,
        table.shape[1],
        table.shape[2],
        shrunk.shape[3],
        shrunk.stride(1),
        work.tiles.shape[1],
        SPLITS=shrunk.shape[1],
        TILE_ROWS=TILE_ROWS,
        PAGE_ROWS=PAGE_ROWS,
        BLOCK_N=triton_expand.BLOCK_N,
        PRECISION=triton_expand.precision_of(y.dtype),
        **triton_expand.LAUNCH,
    )
