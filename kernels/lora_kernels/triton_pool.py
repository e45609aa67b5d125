"""Fills pages of the pool: one launch for a staged run of layers, whatever linears and ranks it holds."""

# A kernel is Triton's language in Python's syntax: its arguments have no Python types, its constants are capitals.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from lora_kernels.layout import PAGE_ROWS

BLOCK = 256
"""Columns of a program: 16 rows of 512 bytes, 32 values a thread. Reasoned, not yet measured."""

ALIGNMENT = 8
"""Values of 16 bits that one access carries, where all copies begin and end at multiples of it."""

LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def copy_pages_kernel(
    pool,
    staged,
    copies,
    count,
    PAGE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """A block of columns of one page.

    Semantics: see `lora_kernels.pool_copy.scatter`
    Shape:
        grid: (count, ceil(widest / BLOCK))
        pool, staged: [values], each fp32, fp16 or bf16   copies: [5, count] int64, the fields of `PageCopy`
        ALIGNMENT: a divisor of every source, target, width and stride
    Cost, a page of which r rows are an adapter's: r * width values read, 16 * width written.
    """
    copy = tl.program_id(0)
    source = tl.multiple_of(tl.load(copies + copy), ALIGNMENT)
    target = tl.multiple_of(tl.load(copies + count + copy), ALIGNMENT)
    rows = tl.load(copies + 2 * count + copy)
    width = tl.multiple_of(tl.load(copies + 3 * count + copy), ALIGNMENT)
    stride = tl.multiple_of(tl.load(copies + 4 * count + copy), ALIGNMENT)

    row = tl.arange(0, PAGE_ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_page = (column < width) & (row < PAGE_ROWS)
    values = tl.load(staged + source + row * stride + column, mask=in_page & (row < rows), other=0.0)
    tl.store(pool + target + row * width + column, values.to(pool.dtype.element_ty), mask=in_page)


def copy_pages(pool: Tensor, staged: Tensor, copies: NDArray[np.int64]) -> None:
    """Launch `copy_pages_kernel`.   copies: [n, fields of PageCopy], checked"""
    source, target, _, width, stride = copies.T
    aligned = not (np.stack([source, target, width, stride]) % ALIGNMENT).any()
    listed = torch.from_numpy(np.ascontiguousarray(copies.T))
    if pool.is_cuda:
        listed = listed.pin_memory().to(pool.device, non_blocking=True)
    copy_pages_kernel[(len(copies), triton.cdiv(int(width.max()), BLOCK))](
        pool,
        staged,
        listed,
        len(copies),
        PAGE_ROWS=PAGE_ROWS,
        BLOCK=BLOCK,
        ALIGNMENT=ALIGNMENT if aligned else 1,
        **LAUNCH,
    )
