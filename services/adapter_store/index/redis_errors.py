"""What a Redis server or the network does wrong, as errors a person can act on.

    Unavailable INDEX_UNAVAILABLE               away, slow, loading, or no primary; trying later helps
    FailedPrecondition INDEX_ACCESS_DENIED      user, password or rights are not enough
    FailedPrecondition INDEX_REFUSED            any other refusal, with the server's own words
    ResourceExhausted INDEX_FULL                the server is at its maxmemory

Credentials are the store's, not the caller's: so a refusal is never PermissionDenied, which is about the caller.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from services.common.errors import FailedPrecondition, MultiloraError, ResourceExhausted, Unavailable

RETRY_AFTER_SECONDS = 1.0

# The first word of an answer that another moment, or another primary, will not give.
_PASSING = (
    "LOADING",
    "READONLY",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "MISCONF",
    "NOREPLICAS",
    "BUSY",
    "UNBLOCKED",
)


@contextlib.contextmanager
def redis_errors(where: str) -> Iterator[None]:
    """Raise what redis-py raises as one of the above. where: the server's address, without its password."""
    from redis.exceptions import RedisError

    try:
        yield
    except RedisError as error:
        raise _told(where, error) from error


def unavailable(where: str, why: object) -> Unavailable:
    return Unavailable(
        "INDEX_UNAVAILABLE",
        f"the index on {where} cannot be used now: {why}; check that this Redis is up, is the primary, and can be "
        "reached from the store, then try again",
        retry_after=RETRY_AFTER_SECONDS,
    )


def _told(where: str, error: Exception) -> MultiloraError:
    from redis import exceptions

    text = str(error)
    word = text.partition(" ")[0]
    denied = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
    if isinstance(error, denied) or "can't run this command" in text:
        return FailedPrecondition(
            "INDEX_ACCESS_DENIED",
            f"the Redis on {where} does not let the store in: {text}; check REDIS_USERNAME and REDIS_PASSWORD (or "
            "those in --index), and the commands and keys this user is allowed",
        )
    if isinstance(error, exceptions.OutOfMemoryError):
        return ResourceExhausted(
            "INDEX_FULL",
            f"the Redis on {where} is at its maxmemory: {text}; give it more",
            retry_after=RETRY_AFTER_SECONDS,
        )
    passing = (
        exceptions.ConnectionError,  # LOADING is one
        exceptions.TimeoutError,
        exceptions.ReadOnlyError,
        exceptions.ClusterDownError,
        exceptions.TryAgainError,
    )
    if isinstance(error, passing) or word in _PASSING:
        return unavailable(where, text or type(error).__name__)
    return FailedPrecondition(
        "INDEX_REFUSED", f"the Redis on {where} refuses: {text}; check that nothing else uses its --redis-prefix"
    )
