"""What a service's process sets up before it serves."""

from __future__ import annotations

import ctypes
import gc
import sys

# A call goes from the loop to a thread and back: Python's 5 ms for either to let go of the other would be its p99.
SWITCH_SECONDS = 0.001

# glibc's mallopt. Without them a message's memory goes back to the kernel when it is freed, and the next one takes as
# many pages anew.
_M_TRIM_THRESHOLD, _KEPT_BYTES = -1, 16 << 20
_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES = -3, 4 << 20


def settle() -> None:
    """Call when all is loaded. What is there stays: looking through it for garbage would stop every call for 30 ms.

    What loading has freed goes back to the system, where the allocator is glibc's: 100 MB after a small model.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    _glibc("malloc_trim", 0)


def keep_freed_memory() -> None:
    """Have the allocator keep some of what is freed, for the next message; nothing where it is not glibc's."""
    _glibc("mallopt", _M_TRIM_THRESHOLD, _KEPT_BYTES)
    _glibc("mallopt", _M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)


def _glibc(function: str, *arguments: int) -> None:
    """Call it where the C library has it."""
    found = getattr(ctypes.CDLL(None), function, None)
    if found is not None:
        found(*arguments)
