"""What a service's process sets up before it serves."""

from __future__ import annotations

import gc
import sys

# A call goes from the loop to a thread and back: Python's 5 ms for either to let go of the other would be its p99.
SWITCH_SECONDS = 0.001


def settle() -> None:
    """Call when all is loaded. What is there stays: looking through it for garbage would stop every call for 30 ms."""
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
