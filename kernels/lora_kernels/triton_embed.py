"""The embedding's shrink: its input is a token, so a rank's sum over the vocabulary is one value of A."""

# A kernel is Triton's language in Python's syntax: its arguments have no Python types, its constants are capitals.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.errors import MixedDtypes
from lora_kernels.layout import PAGE_ROWS, LoraBatch, LoraWeights
from lora_kernels.triton_path import check_shape, check_values, expand, work_of
from lora_kernels.triton_shrink import PROGRAMS
from lora_kernels.work_list import TILE_ROWS, check_rows

LAUNCH = {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}
"""Warps: 16 x 16 values, each of a cache line of its own, four a thread."""


@triton.jit
def lookup_kernel(
    token_ids,
    a,
    shrunk,
    order,
    tiles,
    items,
    counts,
    page_table,
    ranks,
    width,
    max_pages,
    rank_columns,
    tile_capacity,
    item_capacity,
    TILE_ROWS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
):
    """Tiles of rows x pages of ranks, one after another.

    Semantics:
        for each item, position p of its tile, that row i = order[p] and slot s, each rank j < ranks[s] of its page:
            shrunk[p, j] = A[s][j, token_ids[i]]; 0 where the token is another shard's
    Shape:
        grid: (any,)   token_ids: [rows] int64, less the shard's first token   a: [pool rows, width], width tokens
        shrunk: [rows, rank_columns] float32; the rest as `shrink_kernel` has them, for one slice
    Cost, for a row of rank r: r sectors of 32 bytes of A.
    """
    for item in range(tl.program_id(0), tl.load(counts + 1), tl.num_programs(0)):
        tile = tl.load(items + item)
        page = tl.load(items + item_capacity + item)
        slot = tl.load(tiles + tile)
        position = tl.load(tiles + tile_capacity + tile) + tl.arange(0, TILE_ROWS)
        in_tile = position < tl.load(tiles + 2 * tile_capacity + tile)
        rank_row = page * PAGE_ROWS + tl.arange(0, PAGE_ROWS)
        inside = in_tile[:, None] & (rank_row < tl.load(ranks + slot))[None, :]
        row = tl.load(order + position, mask=in_tile, other=0)
        token = tl.load(token_ids + row, mask=in_tile, other=-1)
        known = (token >= 0) & (token < width)
        # a page past the slice's own is masked by the rank, its place in the table is read all the same
        own_page = tl.load(page_table + slot * max_pages + page, mask=page < max_pages, other=0).to(tl.int64)
        pool_row = own_page * PAGE_ROWS + tl.arange(0, PAGE_ROWS)
        values = tl.load(a + pool_row[None, :] * width + token[:, None], mask=inside & known[:, None], other=0.0)
        place = position[:, None].to(tl.int64) * rank_columns + rank_row[None, :]
        tl.store(shrunk + place, values.to(tl.float32), mask=inside)


def apply_lora_embedding_triton(y: Tensor, token_ids: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """Add each row's adapter of the embedding to `y` [rows, hidden] in place, in two launches.

    Semantics, arguments and errors: see `lora_kernels.dispatch.apply_lora_embedding`.
    """
    check_embedding(y, token_ids, weights)
    if not len(token_ids):
        return
    work = work_of(batch)
    check_rows(work, len(token_ids))
    shrunk = torch.empty(1, 1, len(token_ids), work.max_pages * PAGE_ROWS, dtype=torch.float32, device=y.device)
    table = batch.active.tables[weights.group].table
    lookup_kernel[(min(PROGRAMS, work.items.shape[1]),)](
        token_ids,
        weights.a,
        shrunk,
        work.order,
        work.tiles,
        work.items,
        work.counts,
        table,
        weights.ranks,
        weights.a.shape[2],
        table.shape[2],
        shrunk.shape[3],
        work.tiles.shape[1],
        work.items.shape[1],
        TILE_ROWS=TILE_ROWS,
        PAGE_ROWS=PAGE_ROWS,
        **LAUNCH,
    )
    expand(y, shrunk, weights, batch)


def check_embedding(y: Tensor, token_ids: Tensor, weights: LoraWeights) -> None:
    """Raise MixedDtypes, NotContiguous or ShapeMismatch unless the kernels can take these."""
    check_values(weights, y=y)
    if token_ids.dtype is not torch.int64:
        raise MixedDtypes(f"token ids are int64, not {token_ids.dtype}")
    check_shape("token_ids", token_ids, y.shape[0])
    check_shape("y", y, y.shape[0], weights.b[0].shape[1])
    check_shape("A", weights.a, 1, *weights.a.shape[1:])
