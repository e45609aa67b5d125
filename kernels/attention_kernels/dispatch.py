"""The one place that chooses how attention is computed."""

from __future__ import annotations

from torch import Tensor

from attention_kernels.layout import PagedRows
from attention_kernels.torch_path import paged_attention_torch


def paged_attention(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, rows: PagedRows) -> None:
    """Attend causally, scores over the root of head_dim; rows in no tile are left as they are.

    Shape:
        out, q: [rows, heads, head_dim]   keys, values: [blocks * block_size, kv_heads, head_dim], all of one dtype
        head h reads the keys of head h // (heads / kv_heads)
    """
    if q.is_cuda:
        from attention_kernels.triton_path import paged_attention_triton

        paged_attention_triton(out, q, keys, values, rows)
    else:
        paged_attention_torch(out, q, keys, values, rows)
