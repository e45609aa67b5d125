"""How an adapter's bytes go to the pool: at once, or on a GPU's copy engine while steps run."""

from __future__ import annotations

from collections.abc import Callable

import torch

Arrived = Callable[[], bool]
Copies = Callable[[Callable[[], None]], Arrived]
"""Runs a copy; what it returns says whether the copy is done. Copies are done in the order in which they are run."""


def at_once(copy: Callable[[], None]) -> Arrived:
    copy()
    return _always


def beside_steps(device: torch.device) -> Copies:
    """On a stream of its own. One by one, so that adapters share the copy engine in the order they came."""
    if device.type != "cuda":
        return at_once
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(copy: Callable[[], None]) -> Arrived:
        stream.wait_stream(torch.cuda.current_stream(device))  # what lies in those pages may be read still
        with torch.cuda.stream(stream):
            copy()
        event: torch.cuda.Event = stream.record_event()
        return event.query

    return run


def _always() -> bool:
    return True
