"""The host side of the attention kernels: one launch for prefill tiles, two for decode rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attention_kernels import triton_attention
from attention_kernels.layout import PagedRows, next_power_of_two

LEAST_LANES = 16
"""Query vectors of a program: the fewest a tensor core multiplies."""


def paged_attention_triton(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, rows: PagedRows) -> None:
    """See `dispatch.paged_attention`. Waits for nothing; heads of a row lie side by side in `q` and `out`."""
    tiles = rows.tiles.shape[1]
    if not tiles:
        return
    heads, kv_heads, head_dim = q.shape[1], keys.shape[1], q.shape[2]
    group = heads // kv_heads
    decodes = rows.tokens == 1
    capacity = rows.block_tables.shape[1] * rows.block_size
    parts = -(-capacity // triton_attention.PART_KEYS) if decodes else 1
    # Never filled: what combine reads was written.
    sums = torch.empty((len(q), heads, parts, head_dim) if decodes else 1, dtype=torch.float32, device=q.device)
    stats = torch.empty((len(q), heads, parts, 2) if decodes else 1, dtype=torch.float32, device=q.device)
    constants = constants_of(head_dim, group, rows.tokens)
    triton_attention.attention_kernel[(tiles, kv_heads, parts)](
        q,
        keys,
        values,
        out,
        sums,
        stats,
        rows.block_tables,
        rows.positions,
        rows.tiles,
        triton_attention.LOG2_E / math.sqrt(head_dim),
        rows.block_tables.stride(0),
        q.stride(0),
        out.stride(0),
        keys.stride(0),
        tiles,
        parts,
        rows.block_size,
        heads,
        **constants,
        **triton_attention.launch_of(constants["HEAD_BLOCK"], q.element_size()),
    )
    if decodes:
        triton_attention.combine_kernel[(tiles, heads)](
            out,
            sums,
            stats,
            rows.positions,
            rows.tiles,
            out.stride(0),
            tiles,
            parts,
            heads,
            HEAD_DIM=head_dim,
            HEAD_BLOCK=constants["HEAD_BLOCK"],
            PART_KEYS=triton_attention.PART_KEYS,
            **triton_attention.COMBINE_LAUNCH,
        )


def constants_of(head_dim: int, group: int, tokens: int) -> dict[str, int]:
    """What `attention_kernel` is specialised for."""
    group_block = next_power_of_two(group)
    return {
        "HEAD_DIM": head_dim,
        "HEAD_BLOCK": next_power_of_two(head_dim),
        "GROUP": group,
        "GROUP_BLOCK": group_block,
        "TOKENS": max(next_power_of_two(tokens), LEAST_LANES // group_block),
        "BLOCK_KEYS": triton_attention.BLOCK_KEYS,
        "PART_KEYS": triton_attention.PART_KEYS if tokens == 1 else 0,
    }
