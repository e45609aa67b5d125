"""Who asks for a change: whom the token or certificate names, and whom they name themselves in the metadata."""

from __future__ import annotations

from typing import Any

import grpc.aio

from services.adapter_store.findings import shown
from services.common.auth.callers import caller
from services.common.errors import InvalidArgument

ACTOR_KEY = "x-multilora-actor"
MAX_ACTOR_CHARS = 128


def actor_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """`ci`, or `ci (jane)` when the call names somebody; where nobody is asked who they are, that name alone.

    Raises InvalidArgument for a name that a history could not show.
    """
    known, told = caller().name, _told(context)
    return f"{known} ({told})" if known and told else known or told


def _told(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == ACTOR_KEY:
            actor = value.decode(errors="replace") if isinstance(value, bytes) else value
            if len(actor) > MAX_ACTOR_CHARS or not actor.isprintable():
                raise InvalidArgument(
                    "INVALID_ACTOR",
                    f"{ACTOR_KEY} is {shown(actor)}; at most {MAX_ACTOR_CHARS} printable characters are taken",
                    field=ACTOR_KEY,
                )
            return actor
    return ""
