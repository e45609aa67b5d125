"""Errors as OpenAI's clients read them: one table from codes to HTTP statuses, one body."""

from __future__ import annotations

import math
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from services.common.auth.callers import note
from services.common.errors import MultiloraError

HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "DATA_LOSS": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CHAT_PATH = "/v1/chat/completions"
LOAD_PATH, UNLOAD_PATH = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

# Fields that have another name in this face; all others lose their group, as in `sampling.temperature`.
_PARAMS = {"adapter": "model", "stopping.include_stop": "include_stop_str_in_output"}
_CHAT_PARAMS = _PARAMS | {"prompt": "messages", "output.logprobs": "top_logprobs"}
_LOADING_PARAMS = {"adapter": "lora_name", "path": "lora_path"}
_PARAMS_BY_PATH = {CHAT_PATH: _CHAT_PARAMS, LOAD_PATH: _LOADING_PARAMS, UNLOAD_PATH: _LOADING_PARAMS}
_GROUPS = re.compile(r"^(sampling|stopping|output)\.")


def error_body(error: MultiloraError, path: str) -> dict[str, Any]:
    """The JSON of an error on a call of `path`: `code` is the stable reason, `param` the field in this face's names."""
    params = _PARAMS_BY_PATH.get(path, _PARAMS)
    param = params.get(error.field) or _GROUPS.sub("", error.field)
    message = error.message.replace(error.field, param) if "." in error.field else error.message
    return _body(http_status(error), message, param or None, error.reason)


def http_status(error: MultiloraError) -> int:
    return HTTP_STATUS[error.code]


def _body(status: int, message: str, param: str | None, code: str) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def on_multilora_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MultiloraError)
    note(outcome=error.reason)
    headers = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
    if error.code == "UNAUTHENTICATED":
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error, request.url.path), http_status(error), headers)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """What the router and the body's reader refuse: 404, 405, 413."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = error.detail.upper().replace(" ", "_")
    note(outcome=code)
    return JSONResponse(_body(error.status_code, message, None, code), error.status_code, error.headers)


async def on_fault(_request: Request, _error: Exception) -> JSONResponse:
    """Whatever else is raised; Starlette raises it again after this, for the log."""
    return JSONResponse(_body(500, "the server failed; its log says more", None, "INTERNAL"), 500)
