"""Who asks for a change, as they name themselves in the call's metadata; recorded, and not yet checked."""

from __future__ import annotations

from typing import Any

import grpc.aio

from services.adapter_store.findings import shown
from services.common.errors import InvalidArgument

ACTOR_KEY = "x-multilora-actor"
MAX_ACTOR_CHARS = 128


def actor_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Empty when the call names none. Raises InvalidArgument for one that a history could not show."""
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
