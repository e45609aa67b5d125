"""What a step tells the device: integers, in one copy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int32]

ALIGNMENT = 4
"""Each array starts at 16 bytes, whatever the others' lengths: Triton compiles anew for a pointer that does not."""


class DeviceInts:
    """Named int32 arrays side by side, of fixed addresses on host and device; they start as zeros on the host.

    host, device: each array by name, here to be written and there to be read
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        room = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()]
        self._host = torch.zeros(sum(room), dtype=torch.int32)
        self._device = torch.zeros(sum(room), dtype=torch.int32, device=device)
        self.host: dict[str, Ints] = {}
        self.device: dict[str, Tensor] = {}
        halves = zip(torch.split(self._host, room), torch.split(self._device, room), strict=True)
        for (name, shape), (here, there) in zip(shapes.items(), halves, strict=True):
            self.host[name] = here[: sizes[name]].view(shape).numpy()
            self.device[name] = there[: sizes[name]].view(shape)

    def send(self) -> None:
        """Copy all of them, without waiting, from memory of its own: what was sent before may be on its way still."""
        self._device.copy_(self._host.pin_memory() if self._device.is_cuda else self._host, non_blocking=True)
