"""Mutations that keep a format's frame and its JSON whole, so that what lies behind the JSON parser is reached, too."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**64, 10**400, 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "\0", "\ud800", "a" * 300, "(a+)+b", [], {}, [[]], [0, 0], [1, 9], {"": None}, {"x": [1]}),
)
_DEEP = b"[" * 8000


def mutate_json(data: bytes, seed: int) -> bytes:
    """Put something odd into one place of a JSON document; other bytes are returned as they are."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    chance = random.Random(seed)
    if chance.random() < 0.01:
        return data[: chance.randrange(len(data) + 1)] + _DEEP
    places = list(_places(document))
    if not places:
        return data
    holder, key = chance.choice(places)
    other, there = chance.choice(places)
    action = chance.randrange(4)
    if action == 0 and isinstance(holder, dict):
        holder[chance.choice(["", "x", "format", "__metadata__", str(there)])] = holder.pop(key)
    elif action == 1:
        del holder[key]
    elif action == 2:
        holder[key] = json.loads(json.dumps(other[there]))
    else:
        holder[key] = chance.choice(_ODD)
    return json.dumps(document).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every holder and key or position beneath a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


def framed(prefix: struct.Struct, align: int) -> Callable[[bytes, int], bytes]:
    """Of a header whose length is the last number of a prefix, and that is followed by zeros up to `align`."""

    def mutate(data: bytes, seed: int) -> bytes:
        if len(data) < prefix.size:
            return data
        *first, length = prefix.unpack_from(data)
        end = prefix.size + length
        if end > len(data):
            return data
        body = mutate_json(data[prefix.size : end], seed)
        payload = data[-(-end // align) * align :]
        head = prefix.pack(*first, len(body)) + body
        return head.ljust(-(-len(head) // align) * align, b"\0") + payload

    return mutate
