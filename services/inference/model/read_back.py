"""What a step tells the host, copied beside the steps after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class ReadBack:
    """Copies tensors to the host on a stream of its own, so that a read waits for one copy and no step for it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def start(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin the copy, once what was launched until now is done; what it returns waits for it and has the tensor.

        tensor: memory that no later step writes to
        """
        if self._stream is None:
            return lambda: tensor
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            there.copy_(tensor, non_blocking=True)
        event: torch.cuda.Event = self._stream.record_event()

        def wait(_kept: Tensor = tensor) -> Tensor:  # its memory is nobody else's before the copy is done
            event.synchronize()
            return there

        return wait

    def fetch(self, tensor: Tensor) -> Tensor:
        """On the host, now: of a step that was read, past whatever was launched since."""
        with torch.cuda.stream(self._stream):
            return tensor.cpu()
