"""PEFT's rank_pattern and alpha_pattern: regular expressions over module names, written by whoever uploads.

Python's `re` backtracks and holds the interpreter's lock while it does, so one pattern such as `([a-z.]+)+!` would
stop the whole service. Patterns are therefore bounded before they are compiled: nothing repeats a group, and at most
`MAX_CHOICES` repeats and groups, so that a match on a module's name takes at most its length to that power.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Generic, TypeVar

from services.adapter_store.findings import shown

MAX_CHOICES = 3
MAX_PATTERN_CHARS = 256
MAX_PATTERNS_WITH_CHOICES = 16

_ESCAPED = re.compile(r"\\.")
_CHARACTER_CLASS = re.compile(r"\[[^\]]*\]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
# Comments, flags and look-around could hide operators from the count, and no module's name needs them.
_EXTENSION = re.compile(r"\(\?(?!:)")
_CHOICE = re.compile(r"[*+?{(]")

Value = TypeVar("Value", int, float)


class PatternError(ValueError):
    """A pattern is no regular expression, or one whose match could take too long."""


class Patterns(Generic[Value]):
    """Values by pattern. The first pattern to match a name wins, as in PEFT's get_pattern_key."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        """Raises PatternError naming the pattern."""
        if sum(_choices(pattern) > 0 for pattern in values) > MAX_PATTERNS_WITH_CHOICES:
            raise PatternError(f"more than {MAX_PATTERNS_WITH_CHOICES} patterns have repeats or groups; name modules")
        self._values: list[tuple[re.Pattern[str], Value]] = [
            (_compile(pattern), value) for pattern, value in values.items()
        ]

    def lookup(self, name: str, default: Value) -> Value:
        for pattern, value in self._values:
            if pattern.match(name):
                return value
        return default


def _compile(pattern: str) -> re.Pattern[str]:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise PatternError(f"pattern {shown(pattern)} is longer than {MAX_PATTERN_CHARS} characters; shorten it")
    if _EXTENSION.search(_ESCAPED.sub("e", pattern)):
        raise PatternError(f"pattern {shown(pattern)} has a '(?' other than '(?:'; write it without")
    if _REPEATED_GROUP.search(_bare(pattern)) or _choices(pattern) > MAX_CHOICES:
        raise PatternError(
            f"pattern {shown(pattern)} repeats a group or has more than {MAX_CHOICES} repeats and groups, "
            "so a match could take too long; name the modules one by one"
        )
    try:
        with warnings.catch_warnings(action="error"):
            # group 1 and `$` as in PEFT: re.match(rf"(.*\.)?({key})$", name)
            return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise PatternError(f"pattern {shown(pattern)} is no regular expression ({error}); correct it") from error


def _choices(pattern: str) -> int:
    return len(_CHOICE.findall(_bare(pattern)))


def _bare(pattern: str) -> str:
    """The pattern with escaped characters and character classes as one letter each, so that only operators remain."""
    return _CHARACTER_CLASS.sub("c", _ESCAPED.sub("e", pattern))
