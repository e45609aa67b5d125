"""The one place that chooses how LoRA is applied. Callers know tensors and a batch, never a backend."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.layout import LoraBatch, LoraWeights
from lora_kernels.torch_path import apply_lora_torch


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
