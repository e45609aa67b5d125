"""What an S3 server or the network does wrong, as errors a person can act on.

    Unavailable STORAGE_UNAVAILABLE              away, slow, or answering 5xx after all attempts; trying later helps
    FailedPrecondition STORAGE_ACCESS_DENIED     the store's own credentials are missing, wrong or not enough
    FailedPrecondition STORAGE_BUCKET_NOT_FOUND  no such bucket
    FailedPrecondition STORAGE_REFUSED           any other refusal, with the server's own code and words
    ResourceExhausted STORAGE_FULL               the server has no room

Credentials are the store's, not the caller's: so a refusal is never PermissionDenied, which is about the caller.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from services.common.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable

RETRY_AFTER_SECONDS = 2.0

_DENIED = frozenset(
    {
        "AccessDenied",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
    }
)
_FULL = frozenset({"QuotaExceeded", "InsufficientCapacity", "EntityTooLarge", "XMinioStorageFull"})
# BadDigest and the like: what arrived is not what was sent
_PASSING = frozenset({"BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown"})


class ObjectMissing(Exception):
    """There is no such object."""


class Taken(Exception):
    """A condition of the request does not hold: the object is there, or is another, or has no such range."""


@contextlib.contextmanager
def s3_errors(where: str, action: str, name: str = "") -> Iterator[None]:
    """Raise what botocore raises as one of the above, or as ObjectMissing or Taken. where: the bucket's URI."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise _denied(where, action, str(error)) from error
    except ValueError as error:  # as an endpoint that is no URL
        raise InvalidArgument("INVALID_S3_SETTING", f"{where}: {error}") from error
    except ClientError as error:
        raise _refused(where, action, name, error) from error
    except BotoCoreError as error:
        raise unavailable(where, action, name, error) from error


def unavailable(where: str, action: str, name: str, why: object) -> Unavailable:
    return Unavailable(
        "STORAGE_UNAVAILABLE",
        f"cannot {action} {where}/{name}: {why}; check that the S3 server is up and can be reached from the store, "
        "then try again",
        retry_after=RETRY_AFTER_SECONDS,
    )


def _refused(where: str, action: str, name: str, error: Any) -> Exception:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error.response.get("Error", {}).get("Code", "")
    if code == "NoSuchBucket":
        return FailedPrecondition("STORAGE_BUCKET_NOT_FOUND", f"{where}: there is no such bucket; create it")
    if status == 404:
        return ObjectMissing(name)
    if status in (409, 412, 416):
        return Taken(name)
    if code in _FULL or status == 507:
        return ResourceExhausted("STORAGE_FULL", f"cannot {action} {where}/{name}: {error}; make room on the S3 server")
    if code in _DENIED or status in (401, 403):
        return _denied(where, action, str(error))
    if status >= 500 or status == 429 or code in _PASSING:
        return unavailable(where, action, name, error)
    return FailedPrecondition(
        "STORAGE_REFUSED", f"cannot {action} {where}/{name}: {error}; check --s3-region and the server"
    )


def _denied(where: str, action: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        "STORAGE_ACCESS_DENIED",
        f"the S3 server does not let the store {action} in {where}: {why}; check AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY (or the role), what they may do in this bucket, and this machine's clock",
    )
