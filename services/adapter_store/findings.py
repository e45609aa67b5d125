"""What is wrong with an upload: every finding is collected, then all are raised as one error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from services.common.errors import FailedPrecondition, InvalidArgument

# A status travels in HTTP/2 trailers, of which peers accept 8 KiB, and carries the message twice, once in base64.
MAX_MESSAGE_BYTES = 2400
MAX_SHOWN_CHARS = 160


class Reason(StrEnum):
    """Stable reasons of findings; clients may branch on them."""

    MISSING_FILE = "MISSING_FILE"
    UNSAFE_FORMAT = "UNSAFE_FORMAT"
    INVALID_ADAPTER_CONFIG = "INVALID_ADAPTER_CONFIG"
    INVALID_SAFETENSORS = "INVALID_SAFETENSORS"
    DUPLICATE_TENSOR = "DUPLICATE_TENSOR"
    UNPAIRED_TENSOR = "UNPAIRED_TENSOR"
    RANK_MISMATCH = "RANK_MISMATCH"
    DTYPE_MISMATCH = "DTYPE_MISMATCH"
    NON_FINITE_WEIGHTS = "NON_FINITE_WEIGHTS"
    UNSUPPORTED_FEATURE = "UNSUPPORTED_FEATURE"
    UNSUPPORTED_DTYPE = "UNSUPPORTED_DTYPE"
    BASE_MODEL_MISMATCH = "BASE_MODEL_MISMATCH"
    CHANGED_BASE_WEIGHTS = "CHANGED_BASE_WEIGHTS"
    EXTRA_VOCABULARY = "EXTRA_VOCABULARY"
    UNKNOWN_MODULE = "UNKNOWN_MODULE"
    LAYER_OUT_OF_RANGE = "LAYER_OUT_OF_RANGE"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    ADAPTER_RANK_TOO_HIGH = "ADAPTER_RANK_TOO_HIGH"
    NO_MODULES = "NO_MODULES"
    ZERO_ADAPTER = "ZERO_ADAPTER"


# Wrong in itself, whatever the base model: INVALID_ARGUMENT. The others do not fit what is here: FAILED_PRECONDITION.
MALFORMED = frozenset(
    {
        Reason.MISSING_FILE,
        Reason.UNSAFE_FORMAT,
        Reason.INVALID_ADAPTER_CONFIG,
        Reason.INVALID_SAFETENSORS,
        Reason.DUPLICATE_TENSOR,
        Reason.UNPAIRED_TENSOR,
        Reason.RANK_MISMATCH,
        Reason.DTYPE_MISMATCH,
        Reason.NON_FINITE_WEIGHTS,
    }
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: the message names the culprit and says what to do; `facts` go into the metadata."""

    reason: Reason
    message: str
    facts: dict[str, Any] = field(default_factory=dict)


class Findings:
    """The findings of one upload, in the order they were made."""

    def __init__(self) -> None:
        self._found: list[Finding] = []

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._found)

    def add(self, reason: Reason, message: str, **facts: Any) -> None:
        self._found.append(Finding(reason, message, facts))

    def raise_if_any(self) -> None:
        """Raise one error for all: InvalidArgument when any finding is malformed input, else FailedPrecondition.

        Its reason and facts are the first finding's; metadata `finding_count` and `reasons` cover them all.
        """
        if not self._found:
            return
        first = self._found[0]
        kind = InvalidArgument if any(finding.reason in MALFORMED for finding in self._found) else FailedPrecondition
        reasons = Counter(finding.reason for finding in self._found)
        raise kind(
            first.reason,
            _message(self._found),
            finding_count=len(self._found),
            reasons=",".join(reasons),
            **first.facts,
        )


def _message(found: list[Finding]) -> str:
    """All findings in one text; where it would grow too long, the first of every reason comes before the rest."""
    if len(found) == 1:
        return f"{found[0].reason}: {found[0].message}"
    firsts = list({finding.reason: finding for finding in reversed(found)}.values())[::-1]
    rest = [finding for finding in found if finding not in firsts]
    text, told = f"{len(found)} findings", 0
    for finding in (*firsts, *rest):
        line = f"; {finding.reason}: {finding.message}"
        if len((text + line).encode()) > MAX_MESSAGE_BYTES:
            break
        text, told = text + line, told + 1
    return text if told == len(found) else f"{text}; and {len(found) - told} more"


def shown(value: object) -> str:
    """A value from an upload as a message may show it: quoted, without control characters, cut when long."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}… ({len(text)} characters)"
