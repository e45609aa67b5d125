"""Which rows attend, and where the cache holds what they see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_LANES = 64
"""Query vectors that a prefill program multiplies at once, the heads that share a key counted. Reasoned, not measured:
four warps of a tensor core's 16 rows."""


@dataclass(frozen=True, eq=False, slots=True)
class PagedRows:
    """Rows of a batch, cut into tiles that each lie within one sequence.

    block_tables: [sequences, most blocks] int32; entries past a sequence's context are not read
    positions: [rows of the batch] int32; a row sees its sequence's tokens up to and with this one
    tiles: [3, n] int32: a tile's sequence, its first row and its end
    tokens: most rows in a tile; 1 is decode, where contexts are cut too, for many programs to share one
    block_size: tokens a block holds

    On a GPU nothing of this is read by the host, and the grid depends on the shapes alone: a CUDA graph captured over
    these tensors serves any contents.
    """

    block_tables: Tensor
    positions: Tensor
    tiles: Tensor
    tokens: int
    block_size: int


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Rows in a prefill tile; never 1, which says decode."""
    return max(2, TILE_LANES // next_power_of_two(heads // kv_heads))


def cut_into_tiles(spans: Sequence[tuple[int, int, int]], tokens: int) -> Tensor:
    """[3, n] int32 tiles of at most so many rows, of sequences' rows: (sequence, first row, end)."""
    tiles = [
        (sequence, start, min(start + tokens, end))
        for sequence, first, end in spans
        for start in range(first, end, tokens)
    ]
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 3).T.contiguous()


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
