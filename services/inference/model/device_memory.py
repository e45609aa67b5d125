"""What a device's memory holds, and what a step needs of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch


class DeviceMemory(Protocol):
    """A device that has memory of its own."""

    def total_bytes(self) -> int: ...

    def free_bytes(self) -> int:
        """What nobody has, this process and others."""

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most that `run` held at once beyond what was held before it."""

    def kept_bytes(self, make: Callable[[], object]) -> int:
        """What the thing that `make` returns holds for as long as it lives."""


class CudaMemory:
    """A CUDA device, as its driver and torch's allocator count."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def peak_bytes(self, run: Callable[[], object]) -> int:
        torch.cuda.synchronize(self._device)
        held = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - held

    def kept_bytes(self, make: Callable[[], object]) -> int:
        before = self._settled_free_bytes()
        made = make()  # graphs have memory of which the allocator does not tell: the driver is asked
        kept = before - self._settled_free_bytes()
        del made
        self._settled_free_bytes()
        return kept

    def _settled_free_bytes(self) -> int:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return self.free_bytes()


def device_memory(device: str) -> DeviceMemory | None:
    """The memory behind `--device`; None for a CPU, whose memory is shared with everything else."""
    return None if device == "cpu" else CudaMemory(torch.device(device))
