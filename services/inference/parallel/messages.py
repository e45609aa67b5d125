"""What rank 0 tells the other ranks, in this order and over one socket each, and what they say back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from services.inference.adapters.slot_pool import AdapterWeights
from services.inference.config import ServerConfig
from services.inference.model.config import ModelConfig
from services.inference.model.decoder import ForwardBatch
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
    """Set a KV cache of so many blocks aside, in place of the one there is."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class Load:
    adapter: AdapterWeights


@dataclass(frozen=True, slots=True)
class Evict:
    digest: str


@dataclass(frozen=True, slots=True)
class Forward:
    """Run this step beside rank 0."""

    batch: ForwardBatch
    row_slots: Tensor


@dataclass(frozen=True, slots=True)
class Loaded:
    """The first word back."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The last word back: why there is no such rank any more."""

    error: Exception
