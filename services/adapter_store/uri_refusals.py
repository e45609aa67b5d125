"""What is wrong with a URI of RegisterFromUri, worded once for every kind of place."""

from __future__ import annotations

from services.adapter_store.findings import shown
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied


def no_roots() -> FailedPrecondition:
    return FailedPrecondition(
        "NO_URI_ROOTS", "this store reads no paths; start it with --uri-root, or upload the files", field="uri"
    )


def invalid_uri(uri: str) -> InvalidArgument:
    return InvalidArgument(
        "INVALID_URI",
        f"uri: {shown(uri)} is not taken; file:// and an absolute path, or s3://bucket/prefix, is needed",
        field="uri",
    )


def outside_roots(where: str) -> PermissionDenied:
    return PermissionDenied(
        "PATH_OUTSIDE_ROOTS",
        f"uri: {shown(where)} is not beneath a root of this store; move it there, or upload the files",
        field="uri",
    )


def nothing_there(where: str) -> NotFound:
    return NotFound("PATH_NOT_FOUND", f"uri: {shown(where)} is not there or not readable", field="uri")
