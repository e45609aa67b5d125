"""One tree of errors, each with the status it becomes on the wire and a stable reason.

    MultiloraError
    ├── InvalidArgument      the request itself is wrong                       INVALID_ARGUMENT
    ├── NotFound             nothing by that name                              NOT_FOUND
    ├── AlreadyExists        the name is taken by something else               ALREADY_EXISTS
    ├── FailedPrecondition   right in itself, but does not fit what is here    FAILED_PRECONDITION
    ├── Unauthenticated      who calls is not known                            UNAUTHENTICATED
    ├── PermissionDenied     not allowed, as a path outside the roots          PERMISSION_DENIED
    ├── ResourceExhausted    full; try later                                   RESOURCE_EXHAUSTED
    ├── Unimplemented        known, but not served yet                         UNIMPLEMENTED
    ├── Unavailable          something we depend on is away                    UNAVAILABLE
    ├── DeadlineExceeded     the caller's time is up                           DEADLINE_EXCEEDED
    ├── Cancelled            the caller or a shutdown ended it                 CANCELLED
    ├── DataLoss             bytes are not what their digest says              DATA_LOSS
    └── Internal             our fault                                         INTERNAL

`reason` is for programs (`ADAPTER_NOT_FOUND`), the message for a person: what is wrong, and what to do.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self


class MultiloraError(Exception):
    """Base of every error that crosses a service's boundary.

    reason: stable, UPPER_SNAKE; clients may branch on it
    field: the request's field at fault, dotted; empty when no single one is
    retry_after: seconds after which trying again makes sense
    metadata: further facts for programs, as strings
    """

    code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self, reason: str, message: str, *, field: str = "", retry_after: float | None = None, **metadata: object
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after = retry_after
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.reason, self.message, self.field, self.retry_after, self.metadata)

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}]"


def _rebuild(
    kind: type[MultiloraError],
    reason: str,
    message: str,
    field: str,
    retry_after: float | None,
    metadata: dict[str, str],
) -> MultiloraError:
    return kind(reason, message, field=field, retry_after=retry_after, **metadata)


class InvalidArgument(MultiloraError):
    code = "INVALID_ARGUMENT"


class NotFound(MultiloraError):
    code = "NOT_FOUND"


class AlreadyExists(MultiloraError):
    code = "ALREADY_EXISTS"


class FailedPrecondition(MultiloraError):
    code = "FAILED_PRECONDITION"


class Unauthenticated(MultiloraError):
    code = "UNAUTHENTICATED"


class PermissionDenied(MultiloraError):
    code = "PERMISSION_DENIED"


class ResourceExhausted(MultiloraError):
    code = "RESOURCE_EXHAUSTED"


class Unimplemented(MultiloraError):
    code = "UNIMPLEMENTED"

    @classmethod
    def not_yet(cls, field: str) -> Self:
        """A field or call of the contract that this version does not serve."""
        return cls("NOT_SERVED_YET", f"{field} is not served yet; leave it out", field=field)


class Unavailable(MultiloraError):
    code = "UNAVAILABLE"


class DeadlineExceeded(MultiloraError):
    code = "DEADLINE_EXCEEDED"


class Cancelled(MultiloraError):
    code = "CANCELLED"


class DataLoss(MultiloraError):
    code = "DATA_LOSS"


class Internal(MultiloraError):
    code = "INTERNAL"


ERRORS_BY_CODE: dict[str, type[MultiloraError]] = {kind.code: kind for kind in MultiloraError.__subclasses__()}
