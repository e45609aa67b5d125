"""The audit record: a line of JSON for every change that was asked for, in a file that only grows.

    {"at": "2026-11-26T02:14:07.123456+00:00", "service": "adapter-store", "who": "ci", "role": "publisher",
     "tenant": "acme", "peer": "10.0.3.7", "call": "…/SetAlias", "outcome": "OK", "what": {"adapter": "acme/pirate", …}}

Who is whom the token or certificate names. Refused changes stand there too, with the reason as the outcome; so does the
store's own log of every adapter, which is its truth and holds only what was done.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services.common.auth.callers import Caller
from services.common.errors import InvalidArgument

MAX_VALUE_CHARS = 200


class Audit:
    def __init__(self, path: str, service: str) -> None:
        """path: `-` is standard error. Raises InvalidArgument when it cannot be appended to."""
        self._service = service
        try:
            self._file = os.dup(2) if path == "-" else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        except OSError as error:
            raise InvalidArgument(
                "INVALID_FLAG",
                f"--audit-log: {Path(path)} cannot be appended to: {error.strerror}",
                field="--audit-log",
            ) from error

    def write(self, who: Caller, peer: str, call: str, outcome: str, facts: dict[str, Any]) -> None:
        """One line, in one write, so that lines of several processes never mix."""
        line = {
            "at": datetime.now(UTC).isoformat(),
            "service": self._service,
            "who": who.name,
            "role": str(who.role) if who.name else "",
            "tenant": who.tenant if who.name else "",
            "peer": peer,
            "call": call,
            "outcome": outcome,
            "what": {key: _short(value) for key, value in facts.items()},
        }
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


def facts_of(request: Any) -> dict[str, Any]:
    """What a change's request message says, field by field; of bytes, how many there are."""
    if not hasattr(request, "ListFields"):
        return {}
    facts: dict[str, Any] = {}
    for field, value in request.ListFields():
        if field.message_type is None:
            facts[field.name] = list(value) if field.is_repeated else value
        elif field.is_repeated:
            facts[field.name] = [facts_of(each) for each in value]
        else:
            facts |= facts_of(value)
    return facts


def _short(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, str) and len(value) > MAX_VALUE_CHARS:
        return f"{value[:MAX_VALUE_CHARS]}... ({len(value)} characters)"
    return value
