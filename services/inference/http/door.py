"""The guard, as this face has it: requests that it refuses are answered before anything of them is read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from services.common.auth.guard import AUTHORIZATION, Guard
from services.common.errors import MultiloraError
from services.inference.http.errors import on_multilora_error


class Door:
    """Certificates are checked by TLS, and name nobody here: with a file of tokens, HTTP takes tokens."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nothing is routed there
            await self._app(scope, receive, send)
            return
        authorization = Headers(scope=scope).get(AUTHORIZATION)
        try:
            with self._guard.call(_key(scope), authorization, peer=lambda: _peer(scope), names=lambda: ()):
                await self._app(scope, receive, send)
        except MultiloraError as error:  # the guard's: those of handlers are answered within
            await (await on_multilora_error(Request(scope), error))(scope, receive, send)


def _key(scope: Scope) -> str:
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return f"{method} {scope['path']}"


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"
