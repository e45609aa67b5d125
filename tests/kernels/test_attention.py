"""Paged attention against SDPA over contexts laid out in order, on every path; the kernel in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention_kernels import PagedRows, cut_into_tiles, paged_attention, tile_tokens
from lora_kernels.reference import TOLERANCES
from tests.kernels.path_contract import DTYPES

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, PagedRows], None]

BLOCK_SIZE = 16


@dataclass
class Batch:
    """Rows of some sequences over a cache whose other rows are NaN. spans: (sequence, first row, end)"""

    q: Tensor
    keys: Tensor
    values: Tensor
    rows: PagedRows
    spans: list[tuple[int, int, int]]

    def attend(self, attend: Attend) -> Tensor:
        out = torch.full_like(self.q, math.nan)
        attend(out, self.q, self.keys, self.values, self.rows)
        return out

    def expected(self) -> Tensor:
        """In float64, a sequence at a time."""
        out = torch.empty(self.q.shape, dtype=torch.float64)
        for sequence, first, end in self.spans:
            context = int(self.rows.positions[end - 1]) + 1
            seen = torch.arange(context)
            cache_rows = self.rows.block_tables[sequence, seen // BLOCK_SIZE].long() * BLOCK_SIZE + seen % BLOCK_SIZE
            q, k, v = (t.double().transpose(0, 1)[None] for t in (self.q[first:end], *self._at(cache_rows)))
            visible = seen <= self.rows.positions[first:end, None]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
            out[first:end] = attended[0].transpose(0, 1)
        return out

    def _at(self, cache_rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys[cache_rows], self.values[cache_rows]


def build(
    lengths: Sequence[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    most_blocks: int = 0,
) -> Batch:
    """lengths: new tokens and all tokens of each sequence; all with one new token make a decode batch."""
    random = torch.Generator().manual_seed(head_dim)
    counts = [new for new, _ in lengths]
    blocks = [-(-context // BLOCK_SIZE) for _, context in lengths]
    tables = torch.zeros(len(lengths), max(most_blocks, *blocks), dtype=torch.int32)
    free = torch.randperm(sum(blocks), generator=random).to(torch.int32) + 1
    shape = (int(free.numel() + 1) * BLOCK_SIZE, kv_heads, head_dim)
    keys, values = (torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
    spans, taken, row = [], 0, 0
    for sequence, ((new, context), count) in enumerate(zip(lengths, blocks, strict=True)):
        tables[sequence, :count] = free[taken : taken + count]
        seen = torch.arange(context)
        cache_rows = tables[sequence, seen // BLOCK_SIZE].long() * BLOCK_SIZE + seen % BLOCK_SIZE
        for pool in (keys, values):
            pool[cache_rows] = torch.randn(context, kv_heads, head_dim, generator=random).to(dtype)
        spans.append((sequence, row, row + new))
        taken, row = taken + count, row + new
    tokens = 1 if max(counts) == 1 else tile_tokens(heads, kv_heads)
    positions = torch.cat([torch.arange(context - new, context, dtype=torch.int32) for new, context in lengths])
    q = torch.randn(row, heads, head_dim, generator=random).to(dtype)
    return Batch(
        q, keys, values, PagedRows(tables, positions, cut_into_tiles(spans, tokens), tokens, BLOCK_SIZE), spans
    )


def assert_close(out: Tensor, expected: Tensor) -> None:
    """Weights are rounded to the dtype before they multiply values of up to 4: two units in the last place of one."""
    tolerance = TOLERANCES[out.dtype]
    atol = max(tolerance.atol, 2 * torch.finfo(out.dtype).eps)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance.rtol, atol=atol)


@pytest.fixture(params=["torch", "triton"])
def attend(request: pytest.FixtureRequest, attention_path: ModuleType) -> Attend:
    kernel: Attend = attention_path.paged_attention_triton
    return paged_attention if request.param == "torch" else kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 64), (6, 2, 80), (2, 2, 128), (8, 1, 256)])
def test_prefill_chunks(attend: Attend, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    """Whole prompts, a prompt's later chunk and a single row together."""
    batch = build([(37, 37), (5, 70), (1, 18)], heads, kv_heads, head_dim, dtype)
    assert_close(batch.attend(attend), batch.expected())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 64), (3, 1, 96), (2, 2, 128), (2, 1, 256)])
def test_decode_over_parts_of_the_context(
    attend: Attend, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    batch = build([(1, 1), (1, 512), (1, 513), (1, 1100)], heads, kv_heads, head_dim, dtype)
    assert_close(batch.attend(attend), batch.expected())


def test_a_decode_row_has_the_same_bits_whoever_shares_its_batch(attend: Attend) -> None:
    together = build([(1, 40), (1, 600), (1, 3)], 4, 2, 64, most_blocks=80)
    out = together.attend(attend)
    for row in range(3):
        alone = replace(together.rows, tiles=torch.tensor([[row], [row], [row + 1]], dtype=torch.int32))
        one = replace(together, rows=alone).attend(attend)
        assert one[row].equal(out[row])
        assert one.isnan().any(dim=(1, 2)).sum() == 2, "rows in no tile are left as they are"


def test_a_neighbours_nan_changes_no_bit(attend: Attend) -> None:
    batch = build([(1, 40), (1, 70)], 4, 2, 64)
    out = batch.attend(attend)
    batch.q[0] = math.nan
    hurt = batch.attend(attend)
    assert hurt[1].equal(out[1])
    assert hurt[0].isnan().all()


def test_queries_may_be_columns_of_something_wider(attend: Attend) -> None:
    batch = build([(9, 20)], 4, 2, 64)
    wide = torch.zeros(9, 8, 64)
    wide[:, :4] = batch.q
    assert replace(batch, q=wide[:, :4]).attend(attend).equal(batch.attend(attend))


def test_tiles_lie_within_one_sequence() -> None:
    tiles = cut_into_tiles([(0, 0, 5), (1, 5, 6), (2, 6, 10)], 4)
    assert tiles.T.tolist() == [[0, 0, 4], [0, 4, 5], [1, 5, 6], [2, 6, 10]]
    assert cut_into_tiles([], 4).shape == (3, 0)
    assert [tile_tokens(heads, 1) for heads in (1, 3, 4, 64)] == [64, 16, 16, 2]
