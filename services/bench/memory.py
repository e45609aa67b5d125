"""Resident memory of a program and whatever it started, over time: is it flat?"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sample:
    """seconds since the start; bytes resident"""

    seconds: float
    resident: int


def resident_bytes(pid: int) -> int:
    """Of the process and its descendants; 0 once it has ended."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            # the name in parentheses may hold anything; the parent is the second field after it
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    family = {pid}
    while found := {child for child, parent in parents.items() if parent in family} - family:
        family |= found
    return sum(map(_resident, family))


def growth(samples: Sequence[Sample]) -> float:
    """How much a straight line through the samples rises from the first to the last, as a share of their median.

    The line is the one of Theil and Sen, the median of all slopes: a spike that goes away again does not tilt it.
    """
    if len(samples) < 2:
        return 0.0
    slopes = [
        (after.resident - before.resident) / (after.seconds - before.seconds)
        for number, before in enumerate(samples)
        for after in samples[number + 1 :]
        if after.seconds > before.seconds
    ]
    median = statistics.median(sample.resident for sample in samples)
    return statistics.median(slopes) * (samples[-1].seconds - samples[0].seconds) / median


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0
