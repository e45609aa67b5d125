"""Causal attention over a paged cache: one dispatch point, a torch path, a Triton kernel.

Imports torch and (lazily) triton, nothing else of this project.
"""

from attention_kernels.dispatch import paged_attention
from attention_kernels.layout import PagedRows, cut_into_tiles, tile_tokens

__all__ = ["PagedRows", "cut_into_tiles", "paged_attention", "tile_tokens"]
