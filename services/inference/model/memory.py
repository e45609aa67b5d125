"""Memory set aside at start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


def reserve(shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """A zeroed tensor; on a CPU one whose pages the kernel commits as they are first written, as calloc's are.

    torch.zeros writes them all at once: a second a gigabyte at start, for memory that may never be used.
    """
    if device != CPU:
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(*shape)
