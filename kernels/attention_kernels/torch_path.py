"""The torch path: what a CPU runs, a tile at a time, and what the kernel is held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_kernels.layout import PagedRows


def paged_attention_torch(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, rows: PagedRows) -> None:
    """See `dispatch.paged_attention`. Only the tokens that a tile sees are gathered, so no garbage is read."""
    for sequence, first, end in rows.tiles.T.tolist():
        positions = rows.positions[first:end]
        seen = torch.arange(int(positions.max()) + 1)
        blocks = rows.block_tables[sequence, seen // rows.block_size]
        cache_rows = blocks.long() * rows.block_size + seen % rows.block_size
        visible = seen <= positions[:, None]
        query, k, v = (t.transpose(0, 1)[None] for t in (q[first:end], keys[cache_rows], values[cache_rows]))
        attended = F.scaled_dot_product_attention(query, k, v, attn_mask=visible, enable_gqa=True)
        out[first:end] = attended[0].transpose(0, 1)
