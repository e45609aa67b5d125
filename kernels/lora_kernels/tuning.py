"""Block sizes that measurement chose, per device, dtype, shape and batch; the kernels fall back to reasoned defaults.

`tuned.json` is a list of entries as `kernels/bench/tune.py` writes them:

    kernel, device, dtype, shape   what was measured: "shrink" or "expand", the GPU's name, and the widths of the layer
    sums                           constants that decide in which order a sum runs: one choice for every batch
    dealing                        batch rows -> constants that decide only who computes what, and when
    chosen_by                      versions, and microseconds of the choice beside the default's, per batch

A row's bits may not depend on its batch, so only `dealing` may.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tuned.json")

Constants = Mapping[str, int]


def tuned(kernel: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int], rows: int) -> Constants:
    """What to launch with where it was measured, nothing elsewhere.

    rows: of the batch; it takes what the smallest measured batch of at least so many rows takes, else the largest.
    """
    return _lookup(TABLE, kernel, device_name(device), str(dtype).removeprefix("torch."), tuple(shape), rows)


@functools.cache
def device_name(device: torch.device) -> str:
    """The GPU's name as the driver says it; 'cpu' is Triton's interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def entries(table: Path) -> tuple[Mapping[str, Any], ...]:
    """The table's entries. Raises ValueError where two say the same or one says nothing of any batch."""
    read = tuple(json.loads(table.read_text()))
    keys = [_key(entry) for entry in read]
    if len(set(keys)) < len(keys) or not all(entry["dealing"] for entry in read):
        raise ValueError(f"{table} has two entries for one kernel, device, dtype and shape, or one without batches")
    return read


@functools.cache
def _lookup(table: Path, kernel: str, device: str, dtype: str, shape: tuple[int, ...], rows: int) -> Constants:
    for entry in entries(table):
        if _key(entry) == (kernel, device, dtype, shape):
            batches = sorted(map(int, entry["dealing"]))
            batch = next((batch for batch in batches if batch >= rows), batches[-1])
            return {**entry["sums"], **entry["dealing"][str(batch)]}
    return {}


def _key(entry: Mapping[str, Any]) -> tuple[str, str, str, tuple[int, ...]]:
    return entry["kernel"], entry["device"], entry["dtype"], tuple(entry["shape"])
