"""LoRA kernels over rank pages: one dispatch point, a torch path, Triton kernels and the reference they are held to.

Imports torch and (lazily) triton, nothing else of this project.
"""

from lora_kernels.dispatch import apply_lora, apply_lora_embedding
from lora_kernels.errors import LoraInputError
from lora_kernels.layout import PAGE_ROWS, ActiveSet, LoraBatch, LoraWeights, PageTable
from lora_kernels.work_list import BASE_ROW, WorkList

__all__ = [
    "BASE_ROW",
    "PAGE_ROWS",
    "ActiveSet",
    "LoraBatch",
    "LoraInputError",
    "LoraWeights",
    "PageTable",
    "WorkList",
    "apply_lora",
    "apply_lora_embedding",
]
