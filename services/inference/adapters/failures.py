"""How often a pull is tried, and for how long a bad adapter is left alone."""

from __future__ import annotations

import copy

from services.common.errors import DeadlineExceeded, Internal, MultiloraError, ResourceExhausted, Unavailable

PULL_ATTEMPTS = 4
"""Attempts in a row that may bring no byte before a pull has failed. One that brought some goes on from there."""
FIRST_DELAY, LAST_DELAY = 0.1, 2.0
"""Seconds between two attempts: doubled each time, half of it left to chance."""
FIRST_REST, FIRST_LONG_REST, LAST_REST = 1.0, 30.0, 600.0
"""Seconds a failed adapter is left alone, doubled each time: after a fault that passes, and after one that does not."""

_PASSING = (Unavailable, DeadlineExceeded, ResourceExhausted, OSError)


def passes(error: Exception) -> bool:
    """Whether trying again may help: the store or the disk is in trouble, not the adapter."""
    return isinstance(error, _PASSING)


def delay(attempts: int, chance: float) -> float:
    """Seconds before the next attempt, after so many in vain. chance: 0 to 1."""
    most: float = min(FIRST_DELAY * 2.0 ** (attempts - 1), LAST_DELAY)
    return most * (0.5 + chance / 2)


def rest(failures: int, error: Exception) -> float:
    """Seconds until a failed adapter is tried again, after so many failures in a row."""
    first = FIRST_REST if passes(error) else FIRST_LONG_REST
    seconds: float = min(first * 2.0 ** min(failures - 1, 20), LAST_REST)
    return seconds


def as_typed(error: Exception, adapter: str) -> MultiloraError:
    """The error that the adapter's requests end with."""
    if not isinstance(error, MultiloraError):
        error = Internal("ADAPTER_FAILED", f"the replica could not bring adapter {adapter} here; its log says more")
    error.field = error.field or "adapter"
    error.metadata.setdefault("adapter", adapter)
    return error


def cached(error: MultiloraError, seconds: float) -> MultiloraError:
    """The same error again, with the time after which the adapter is tried anew."""
    again = copy.copy(error)
    again.retry_after = seconds
    return again
