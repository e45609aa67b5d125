"""Which of OpenAI's request fields are served, which mean nothing here, and which are refused by name."""

from __future__ import annotations

from typing import Any

from services.common.errors import InvalidArgument

IGNORED = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"})
"""Fields for OpenAI's own bookkeeping: they change no answer, so leaving them unread deceives nobody."""

# Not served yet; beside each, the values that ask for nothing. None and absence ask for nothing everywhere.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "prompt_logprobs": (),
}


def check_fields(body: dict[str, Any], served: frozenset[str]) -> dict[str, Any]:
    """The fields of `body` that are served. Raises InvalidArgument naming the first one that would be passed over."""
    for name, value in body.items():
        if value is None or name in served or name in IGNORED or value in _NOT_SERVED.get(name, ()):
            continue
        if name in _NOT_SERVED:
            raise InvalidArgument(
                "NOT_SERVED_YET", f"{name} is not served yet, other than its default; leave it out", field=name
            )
        raise InvalidArgument("UNKNOWN_FIELD", f"{name} is not a field of this call; leave it out", field=name)
    return {name: value for name, value in body.items() if name in served and value is not None}
