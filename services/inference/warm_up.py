"""Adapters that must be here before a replica says it is ready."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from services.common.errors import FailedPrecondition, Unavailable
from services.inference.replica_control import ReplicaControl

PATIENCE = 120.0
"""Seconds in which a store that is away may come back."""
RETRY = 1.0

log = logging.getLogger(__name__)


async def warm_up(control: ReplicaControl, references: Sequence[str], patience: float = PATIENCE) -> None:
    """Bring what the references mean into the slot pool, one after the other.

    Raises what the store says of a reference, Unavailable when it stays away, and FailedPrecondition when there is no
    slot left: a replica that cannot hold what it must is no replica to send requests to.
    """
    deadline = time.monotonic() + patience
    for reference in references:
        while True:
            try:
                loaded = await control.load(reference)
                break
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("not ready: --warm-adapters %s: %s", reference, error)
                await asyncio.sleep(RETRY)
        if any(each.tier != "GPU" for each in loaded):
            raise FailedPrecondition(
                "WARM_ADAPTERS_DO_NOT_FIT",
                f"--warm-adapters: no slot is left for {reference!r}; raise --max-loras or warm fewer",
            )
        log.info("warm: %s", reference)
