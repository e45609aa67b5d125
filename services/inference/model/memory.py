"""Memory set aside at start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def reserve(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A zeroed CPU tensor whose pages the kernel commits as they are first written, as calloc's are.

    torch.zeros writes them all at once: a second a gigabyte at start, for memory that may never be used.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(*shape)
