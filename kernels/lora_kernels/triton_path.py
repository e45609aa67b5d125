"""The Triton path: a shrink and an expand per linear group, straight from the rank pages.

A row's result is bitwise the same in every batch: tiles, blocks and the parts of a sum are fixed by the layer and by
the row's own rank, sums run in one order, and nothing is added atomically. Rows of the base model are in no tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from lora_kernels import triton_expand, triton_shrink, triton_work_list
from lora_kernels.errors import LoraInputError, MixedDtypes, NotContiguous, ShapeMismatch
from lora_kernels.layout import PAGE_ROWS, LoraBatch, LoraWeights
from lora_kernels.work_list import TILE_ROWS, WorkList, check_rows


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
    shrunk = empty_shrunk(x, weights, work)
    shrink(shrunk, x, weights, batch)
    if batch.sum_shrunk is not None:
        batch.sum_shrunk(shrunk)
    expand(y, shrunk, weights, batch)


def empty_shrunk(x: Tensor, weights: LoraWeights, work: WorkList) -> Tensor:
    """What shrink of the input x [rows, in] writes; never filled, for expand reads only what shrink wrote."""
    shape = weights.slices, triton_shrink.blocks_of(x, weights.slices).splits, x.shape[0], work.max_pages * PAGE_ROWS
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def check_launch(y: Tensor, x: Tensor, weights: LoraWeights) -> None:
    """Raise MixedDtypes, NotContiguous or ShapeMismatch unless the kernels can take these."""
    check_values(weights, y=y, x=x)
    check_shape("y", y, x.shape[0], sum(b.shape[1] for b in weights.b))
    check_shape("x", x, x.shape[0], weights.a.shape[2])


def check_values(weights: LoraWeights, **tensors: Tensor) -> None:
    """Raise MixedDtypes unless all have the pool's dtype, NotContiguous unless a row's values lie side by side."""
    dtypes = {**{name: tensor.dtype for name, tensor in tensors.items()}, "the pool": weights.a.dtype}
    if len(set(dtypes.values())) > 1 or weights.a.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise MixedDtypes(f"all share one of float32, float16 and bfloat16; they are {dtypes}")
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise NotContiguous(f"the values of a row lie side by side; {name} steps {tensor.stride(-1)}")


def check_shape(name: str, tensor: Tensor, *expected: int) -> None:
    """Raise ShapeMismatch unless the tensor has exactly this shape."""
    if tuple(tensor.shape) != expected:
        raise ShapeMismatch(f"{name} is {tuple(tensor.shape)}, expected {expected}")


def work_of(batch: LoraBatch) -> WorkList:
    """The batch's work list; without fixed buffers it is made and built by the first layer that asks.

    Raises LoraInputError while a CUDA graph is captured: a list of the batch's own would be in no other batch.
    """
    if batch.work is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise LoraInputError("a CUDA graph is captured over a work list in fixed buffers: LoraBatch(work=...)")
        pages = batch.active.pages_of_slot
        rows = batch.row_slots.numel()
        work = WorkList.allocate(rows, len(pages), max(1, *pages), batch.row_slots.device)
        work.packed[:rows] = batch.row_slots
        work.packed[rows:] = torch.tensor(pages, dtype=torch.int32)
        triton_work_list.build_work_list(work)
        batch.work = work
    return batch.work


def shrink(
    shrunk: Tensor,
    x: Tensor,
    weights: LoraWeights,
    batch: LoraBatch,
    blocks: triton_shrink.ShrinkBlocks | None = None,
    produce: triton_shrink.Produce | None = None,
) -> None:
    """Launch `shrink_kernel`.

    shrunk: [slices, splits, rows, most pages * PAGE_ROWS] float32;  blocks: else as tuned for the layer and batch
    produce: what becomes of x on the way; else x is the input
    """
    work = work_of(batch)
    table = batch.active.tables[weights.group].table
    splits, rank_columns = shrunk.shape[1], shrunk.shape[3]
    made = produce or triton_shrink.Produce("x", into=x)
    blocks = blocks or triton_shrink.blocks_of(made.into, weights.slices)
    chunks = triton.cdiv(x.shape[0], TILE_ROWS) * triton.cdiv(weights.a.shape[2], triton_shrink.CHUNK)
    programs = min(blocks.programs, max(work.items.shape[1], chunks if produce else 0))
    triton_shrink.shrink_kernel[programs, weights.slices * splits + bool(produce)](
        x,
        x if made.gain is None else made.gain,
        made.into,
        weights.a,
        shrunk,
        work.order,
        work.tiles,
        work.items,
        work.counts,
        table,
        weights.ranks,
        made.eps,
        x.shape[0],
        weights.a.shape[2],
        x.stride(0),
        made.into.stride(0),
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
        BLOCK_K=blocks.block_k,
        CHUNK=triton_shrink.CHUNK,
        INPUT=made.by,
        **{**triton_shrink.LAUNCH, "num_warps": blocks.num_warps, "num_stages": blocks.num_stages},
    )


def expand(
    y: Tensor,
    shrunk: Tensor,
    weights: LoraWeights,
    batch: LoraBatch,
    blocks: triton_expand.ExpandBlocks | None = None,
) -> None:
    """Launch `expand_kernel`.   shrunk: what `shrink` wrote;  blocks: as `shrink` has them"""
    blocks = blocks or triton_expand.blocks_of(y, [b.shape[1] for b in weights.b])
    tiles = work_of(batch).tiles.shape[1]
    triton_expand.expand_kernel[min(blocks.programs, tiles), column_blocks(weights, blocks.block_n)](
        y,
        **expand_arguments(y, shrunk, weights, batch),
        BLOCK_N=blocks.block_n,
        **{**triton_expand.LAUNCH, "num_warps": blocks.num_warps, "num_stages": blocks.num_stages},
    )


def column_blocks(weights: LoraWeights, block_n: int) -> int:
    """Blocks of output columns, each within one slice."""
    return sum(triton.cdiv(b.shape[1], block_n) for b in weights.b)


def expand_arguments(y: Tensor, shrunk: Tensor, weights: LoraWeights, batch: LoraBatch) -> dict[str, Any]:
    """What every kernel that expands takes by these names: of slices that the group lacks, any B and no columns."""
    work = work_of(batch)
    table = batch.active.tables[weights.group].table
    arguments: dict[str, Any] = {}
    for index in range(triton_expand.MOST_SLICES):
        b = weights.b[index] if index < weights.slices else None
        arguments |= {f"b{index}": weights.b[0] if b is None else b, f"out{index}": 0 if b is None else b.shape[1]}
    return arguments | {
        "shrunk": shrunk,
        "order": work.order,
        "tiles": work.tiles,
        "counts": work.counts,
        "page_table": table,
        "ranks": weights.ranks,
        "scales": weights.scales,
        "y_stride": y.stride(0),
        "slots": table.shape[1],
        "max_pages": table.shape[2],
        "rank_columns": shrunk.shape[3],
        "part_stride": shrunk.stride(1),
        "tile_capacity": work.tiles.shape[1],
        "SPLITS": shrunk.shape[1],
        "TILE_ROWS": TILE_ROWS,
        "PAGE_ROWS": PAGE_ROWS,
        "PRECISION": triton_expand.precision_of(y.dtype),
    }
