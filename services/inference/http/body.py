"""A request's body: bounded, JSON, an object."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request

from services.common.errors import InvalidArgument

MAX_BODY_BYTES = 8 << 20


async def read_object(request: Request) -> dict[str, Any]:
    """The body's JSON object. Raises HTTPException 413 past 8 MiB, InvalidArgument when it is no JSON object."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, "Content Too Large")
    try:
        content = from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise InvalidArgument("INVALID_JSON", f"the body is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidArgument("INVALID_JSON", "the body must be a JSON object")
    return content
