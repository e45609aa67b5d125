"""What the ranks of a model tell each other within a step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from services.inference.parallel.shard import WHOLE, Shard


class Collectives(Protocol):
    """Every rank calls the same ones in the same order."""

    shard: Shard

    def sum(self, partial: Tensor) -> Tensor:
        """Add up what the ranks have, in place; returns it."""

    def gather(self, columns: Tensor, width: int) -> Tensor:
        """Lay the ranks' columns side by side on rank 0: [rows, width]. Other ranks get their own back."""


class Alone:
    """One rank, which has it all."""

    shard = WHOLE

    def sum(self, partial: Tensor) -> Tensor:
        return partial

    def gather(self, columns: Tensor, _width: int) -> Tensor:
        return columns


ALONE = Alone()


class Group:
    """Ranks of a process group of torch.distributed."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def sum(self, partial: Tensor) -> Tensor:
        dist.all_reduce(partial)
        return partial

    def gather(self, columns: Tensor, width: int) -> Tensor:
        part = -(-width // self.shard.size)
        columns = F.pad(columns, (0, part - columns.shape[1]))
        if self.shard.rank:
            dist.gather(columns)
            return columns
        parts = [torch.empty_like(columns) for _ in range(self.shard.size)]
        dist.gather(columns, parts)
        return torch.cat(parts, dim=1)[:, :width]


def join(shard: Shard, meeting: Path, device: str) -> None:
    """Meet the other ranks; returns when all have come. NCCL on GPUs, one a rank; gloo on a CPU.

    meeting: a file that only they can reach: torch's store on a port would listen on every address of the host
    """
    if device == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks of a replica share a host
    store = FileStore(str(meeting), shard.size)
    backend, own = ("gloo", None) if device == "cpu" else ("nccl", torch.device("cuda", shard.rank))
    dist.init_process_group(backend, store=store, rank=shard.rank, world_size=shard.size, device_id=own)


def leave() -> None:
    """Whether or not the ranks had met."""
    if dist.is_initialized():
        dist.destroy_process_group()
