"""Paged attention in torch: keys and values live in blocks, a batch names which.

What a block holds beyond a request's tokens is garbage of whoever had it before, perhaps NaN, which a product with
zero would carry into an answer. It is never read: a context is padded with its own first token, and that is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from services.inference.model.memory import CPU, reserve


class KVCache:
    """Keys and values of every layer: keys, values [layers, blocks * block_size, kv_heads, head_dim]."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        shape = (num_layers, num_blocks * block_size, kv_heads, head_dim)
        self.keys = reserve(shape, dtype, device)
        self.values = reserve(shape, dtype, device)
        self.block_size = block_size


class Attention(Protocol):
    """How the rows of a forward pass attend."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
        """Write the new keys and values, then attend causally.

        Shape:
            q: [rows, heads, head_dim]   k, v: [rows, kv_heads, head_dim]   returns [rows, heads * head_dim]
        """


@dataclass(frozen=True, slots=True)
class PrefillSequence:
    """Rows [start, end) of the batch are the last tokens of one request's context.

    cache_rows: [context] int64, where in the cache each token of the context lies
    """

    start: int
    end: int
    cache_rows: Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Rows that attend by SDPA over gathered contexts.

    new_rows: [rows] int64, where in the cache each row's key and value go
    prefill: requests with more than one row
    decode_rows: [n] int64, rows of the batch that are alone in their request
    decode_cache_rows: [n, longest] int64, their contexts in the cache, each padded with its own first row
    decode_visible: [n, 1, 1, longest] bool, False where that is padding
    """

    new_rows: Tensor
    prefill: tuple[PrefillSequence, ...]
    decode_rows: Tensor
    decode_cache_rows: Tensor
    decode_visible: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        keys.index_copy_(0, self.new_rows, k)
        values.index_copy_(0, self.new_rows, v)
        if not self.prefill:
            return _decode(q, keys, values, self).flatten(1)
        out = torch.empty_like(q)
        for sequence in self.prefill:
            rows, context = slice(sequence.start, sequence.end), sequence.cache_rows
            out[rows] = _prefill(q[rows], keys.index_select(0, context), values.index_select(0, context))
        if self.decode_rows.numel():
            out[self.decode_rows] = _decode(q[self.decode_rows], keys, values, self)
        return out.flatten(1)


def _prefill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One request's newest tokens against its whole context, which ends with them: no padding anywhere."""
    new, context = q.shape[0], k.shape[0]
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    if new == context:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        visible = torch.ones(new, context, dtype=torch.bool).tril(context - new)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return out[0].transpose(0, 1)


def _decode(q: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> Tensor:
    """One token of each of n requests, contexts padded to the longest."""
    rows = batch.decode_cache_rows
    k, v = (t.index_select(0, rows.flatten()).view(*rows.shape, *t.shape[1:]).transpose(1, 2) for t in (keys, values))
    out = F.scaled_dot_product_attention(q.unsqueeze(2), k, v, attn_mask=batch.decode_visible, enable_gqa=True)
    return out.squeeze(2)
