"""Where an adapter can be on a replica, and the one function that moves it.

    STORE ─pull→ PULLING ─whole→ DISK ─read→ CPU ─load→ LOADING ─copied→ GPU
    PULLING, DISK, LOADING, GPU, DRAINING ─error→ FAILED ─time→ STORE
    GPU ─evict (least recently used, idle)→ CPU ─evict (count, bytes)→ DISK ─evict (bytes), damage→ STORE
    CPU, GPU ─unload→ DRAINING ─no request holds it→ DISK
    DRAINING ─loaded again, or in use under another name→ CPU, GPU

GPU is active while a step holds the slot, else idle: the slot's count of references says which. Its copies may be under
way still, as the slot says too, and fail. While it drains, an
adapter may still come to a slot and leave it, for the requests that finish.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from enum import Enum

log = logging.getLogger(__name__)


class AdapterState(Enum):
    """What a replica has of an adapter. A new version is another adapter: it starts at STORE."""

    STORE = "STORE"
    PULLING = "PULLING"
    DISK = "DISK"
    CPU = "CPU"
    LOADING = "LOADING"
    GPU = "GPU"
    FAILED = "FAILED"
    DRAINING = "DRAINING"


ARROWS: Mapping[AdapterState, frozenset[AdapterState]] = {
    AdapterState.STORE: frozenset({AdapterState.PULLING}),
    AdapterState.PULLING: frozenset({AdapterState.DISK, AdapterState.FAILED}),
    AdapterState.DISK: frozenset({AdapterState.CPU, AdapterState.STORE, AdapterState.FAILED}),
    AdapterState.CPU: frozenset({AdapterState.LOADING, AdapterState.DISK, AdapterState.DRAINING}),
    AdapterState.LOADING: frozenset({AdapterState.GPU, AdapterState.FAILED}),
    AdapterState.GPU: frozenset({AdapterState.CPU, AdapterState.DRAINING, AdapterState.FAILED}),
    AdapterState.FAILED: frozenset({AdapterState.STORE}),
    AdapterState.DRAINING: frozenset({AdapterState.DISK, AdapterState.CPU, AdapterState.GPU, AdapterState.FAILED}),
}

Transitions = Counter[tuple[str, str]]
"""How often each arrow was taken, by the names of its ends."""


def transition(current: AdapterState, target: AdapterState, who: str, taken: Transitions) -> AdapterState:
    """Take the arrow from `current` to `target`, and return `target`. An arrow that is not drawn is a bug and raises.

    who: the adapter, for the log; taken: where the arrow is counted
    """
    if target not in ARROWS[current]:
        raise AssertionError(f"adapter {who}: {current.name} → {target.name} is not allowed")
    log.debug("adapter %s: %s → %s", who, current.name, target.name)
    taken[current.name, target.name] += 1
    return target
