"""What rank 0 tells the other ranks, in this order and over one socket each, and what they say back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.inference.adapters.slot_pool import AdapterWeights
from services.inference.config import ServerConfig
from services.inference.model.config import ModelConfig
from services.inference.parallel.shard import Shard


@dataclass(frozen=True, slots=True)
class Begin:
    """Load the part of the model that `shard` says, and meet the others there, when told to."""

    config: ServerConfig
    model: ModelConfig
    shard: Shard
    meeting: Path


@dataclass(frozen=True, slots=True)
class Join:
    """All have loaded their part."""


@dataclass(frozen=True, slots=True)
class SetBlocks:
    """Make a runner with so many KV blocks, in place of the one there is.

    for_gpu: whether it is a `GpuRunner`; graphs: whether that one captures its decode, with all ranks' collectives
    """

    num_blocks: int
    for_gpu: bool
    graphs: bool


@dataclass(frozen=True, slots=True)
class Load:
    adapter: AdapterWeights


@dataclass(frozen=True, slots=True)
class Evict:
    digest: str


@dataclass(frozen=True, slots=True)
class Forward:
    """Call `forward` of the runner beside rank 0."""

    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The first word back."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The last word back: why there is no such rank any more."""

    error: Exception
