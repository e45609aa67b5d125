"""How adapters' rows come to lie in the pool: a staged run of layers scattered to its pages, and pages moved.

The pool is one tensor of values, set aside at start, of which every A and B is a view. A copy concerns one page of one
of them, so one list of copies, and one launch, serves any run of layers and all their linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_kernels.errors import MixedDtypes, NotContiguous, PageConflict, RankOverPool, ShapeMismatch
from lora_kernels.layout import PAGE_ROWS


class PageCopy(NamedTuple):
    """Fills one page. source, target: the first value's place in what is read, and in the pool; `rows` rows of `width`
    values are read, `stride` apart, and lie without gaps in the page; the rest of its rows are zeroed."""

    source: int
    target: int
    rows: int
    width: int
    stride: int


PageCopies = Sequence[PageCopy] | NDArray[np.int64]
"""Some of them, or the same as an array [n, fields of `PageCopy`]."""


class StagedRows(NamedTuple):
    """One adapter's A or B in a staged run: `rank` rows, `stride` values apart, the first at `offset`.

    first_column: where this tensor-parallel shard's columns begin, of A where the input is split, of B where the output
    """

    offset: int
    rank: int
    stride: int
    first_column: int = 0


def scatter_copies(pool: Tensor, into: Tensor, pages: Sequence[int], staged: StagedRows | None) -> list[PageCopy]:
    """The copies that lay an adapter's A or B into its pages.

    into: [pages * PAGE_ROWS, width], a view of the pool
    staged: None where the adapter lacks the linear in this layer: its pages are zeroed
    Raises RankOverPool, ShapeMismatch, NotContiguous.
    """
    start, width = _place(pool, into), into.shape[1]
    offset, rank, stride, first_column = staged or StagedRows(0, 0, width)
    if rank > len(pages) * PAGE_ROWS:
        raise RankOverPool(f"{rank} rows do not fit {len(pages)} pages of {PAGE_ROWS}")
    if not 0 <= first_column <= stride - width:
        raise ShapeMismatch(f"columns {first_column} to {first_column + width} of rows of {stride} values")
    return [
        PageCopy(
            source=offset + number * PAGE_ROWS * stride + first_column,
            target=start + page * PAGE_ROWS * width,
            rows=min(PAGE_ROWS, max(0, rank - number * PAGE_ROWS)),
            width=width,
            stride=stride,
        )
        for number, page in enumerate(pages)
    ]


def move_copies(pool: Tensor, within: Tensor, moves: Sequence[tuple[int, int]]) -> list[PageCopy]:
    """The copies that carry whole pages of one A or B, (from, to), elsewhere in it.

    within: [pages * PAGE_ROWS, width], a view of the pool
    """
    start, width = _place(pool, within), within.shape[1]
    size = PAGE_ROWS * width
    return [PageCopy(start + old * size, start + new * size, PAGE_ROWS, width, width) for old, new in moves]


def scatter(pool: Tensor, staged: Tensor, copies: PageCopies) -> None:
    """Copy rows of a staged run into the pool, casting to its dtype, without waiting for the device.

    Semantics:
        for each copy, row j < PAGE_ROWS, column c < width:
            pool[target + j * width + c] = staged[source + j * stride + c] if j < rows else 0
    Shape:
        pool: [values]   staged: [values], of any float dtype, on the pool's device
    Raises MixedDtypes, NotContiguous, ShapeMismatch (a copy leaves the pool or the run), PageConflict, before a launch.
    """
    _check(pool, staged, table := np.array(copies, np.int64).reshape(-1, len(PageCopy._fields)))
    _copy(pool, staged, table)


def move(pool: Tensor, copies: Sequence[PageCopy]) -> None:
    """Copy pages of the pool to other pages, bit by bit; the page table is the caller's to change.

    Raises what `scatter` does; PageConflict also where a page that is read is written, for copies have no order.
    """
    _check(pool, pool, table := np.array(copies, np.int64).reshape(-1, len(PageCopy._fields)))
    source, target, _, width, _ = table.T
    _check_apart(np.concatenate([_spans(target, width), np.unique(_spans(source, width), axis=0)]))
    _copy(pool, pool, table)


def _copy(pool: Tensor, staged: Tensor, copies: NDArray[np.int64]) -> None:
    if not len(copies):
        return
    if pool.is_cuda:
        from lora_kernels.triton_pool import copy_pages

        copy_pages(pool, staged, copies)
    else:
        copy_pages_torch(pool, staged, copies)


def copy_pages_torch(pool: Tensor, staged: Tensor, copies: NDArray[np.int64]) -> None:
    """`scatter` on a CPU.   copies: [n, fields of PageCopy]"""
    for source, target, rows, width, stride in copies.tolist():
        page = pool[target : target + PAGE_ROWS * width].view(PAGE_ROWS, width)
        page[:rows] = staged.as_strided((rows, width), (stride, 1), staged.storage_offset() + source)
        page[rows:] = 0


def _place(pool: Tensor, rows: Tensor) -> int:
    """Where in the pool a view of it begins."""
    if not rows.is_contiguous():
        raise NotContiguous(f"an A or B of the pool lies without gaps; this one has strides {rows.stride()}")
    start = int(rows.storage_offset() - pool.storage_offset())
    inside = 0 <= start <= pool.numel() - rows.numel()
    if rows.untyped_storage().data_ptr() != pool.untyped_storage().data_ptr() or not inside:
        raise ShapeMismatch("the rows are no view of this pool")
    return start


def _check(pool: Tensor, staged: Tensor, copies: NDArray[np.int64]) -> None:
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if pool.dtype not in floats or staged.dtype not in floats:
        raise MixedDtypes(f"pages are copied among float32, float16, bfloat16; not {staged.dtype} to {pool.dtype}")
    if pool.dim() != 1 or staged.dim() != 1 or not (pool.is_contiguous() and staged.is_contiguous()):
        raise NotContiguous("the pool and a staged run are each one row of values without gaps")
    source, target, rows, width, stride = copies.T
    last = source + np.maximum(rows - 1, 0) * stride + np.where(rows > 0, width, 0)
    wrong = (rows < 0) | (rows > PAGE_ROWS) | (width < 1) | (source < 0) | (last > staged.numel())
    wrong |= (target < 0) | (target + PAGE_ROWS * width > pool.numel())
    if wrong.any():
        raise ShapeMismatch(f"{PageCopy(*copies[wrong.argmax()].tolist())} leaves the pool or what it reads")
    _check_apart(_spans(target, width))


def _spans(start: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n, 2], the first value of each page and its end."""
    return np.stack([start, start + PAGE_ROWS * width], axis=1)


def _check_apart(spans: NDArray[np.int64]) -> None:
    ordered = spans[spans[:, 0].argsort()]
    if (ordered[1:, 0] < ordered[:-1, 1]).any():
        raise PageConflict("copies run in no order, so a page is written once, and not read in the same launch")
