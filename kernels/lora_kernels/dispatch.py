"""The one place that chooses how LoRA is applied. Callers know tensors and a batch, never a backend."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.layout import LoraBatch, LoraWeights
from lora_kernels.torch_path import apply_lora_embedding_torch, apply_lora_torch


def apply_lora(y: Tensor, x: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """Add every row's adapter to `y` [rows, sum of out] in place, given the group's input `x` [rows, in].

    Rows of the base model, slices an adapter lacks, and batches without adapters are left as they are.
    With a work list in fixed buffers the launches are the same whatever the batch holds, as a CUDA graph that serves
    other batches needs; without, a batch of the base model alone launches nothing.
    """
    if batch.work is None and not batch.active.slots:
        return
    if x.is_cuda:
        from lora_kernels.triton_path import apply_lora_triton

        apply_lora_triton(y, x, weights, batch)
    else:
        apply_lora_torch(y, x, weights, batch)


def apply_lora_embedding(y: Tensor, token_ids: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """Add every row's adapter of the embedding to `y` in place.

    Semantics:
        for row i with slot s >= 0:
            y[i] += scale[s] * A[s][:, token_ids[i]] @ B[s]      accumulated in float32
        A token outside A's columns is another shard's and adds nothing.
    Shape:
        y: [rows, hidden]   token_ids: [rows] int64   weights: one slice, A [pages * PAGE_ROWS, vocabulary]
    The lm_head is a linear like any other: `apply_lora` over the sampled rows, with a batch of their slots.
    """
    if batch.work is None and not batch.active.slots:
        return
    if y.is_cuda:
        from lora_kernels.triton_embed import apply_lora_embedding_triton

        apply_lora_embedding_triton(y, token_ids, weights, batch)
    else:
        apply_lora_embedding_torch(y, token_ids, weights, batch)
