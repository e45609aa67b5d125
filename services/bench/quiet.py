"""Waits until the machine is idle, so that what is measured next has it to itself.

Some programs spin for a while after their last work, vLLM's worker on a core for a second: what is measured right after
it would pay.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

IDLE_SHARE = 0.05
WINDOW_SECONDS = 0.3
PATIENCE_SECONDS = 15.0


def wait_until_idle(patience: float = PATIENCE_SECONDS) -> bool:
    """Return once the processors are less than 5 % busy, or False after `patience` seconds in which they were not."""
    give_up = time.monotonic() + patience
    cores = os.cpu_count() or 1
    while time.monotonic() < give_up:
        began, busy = time.monotonic(), busy_seconds()
        time.sleep(WINDOW_SECONDS)
        if busy_seconds() - busy < IDLE_SHARE * cores * (time.monotonic() - began):
            return True
    return False


def busy_seconds(stat: Path = Path("/proc/stat")) -> float:
    """Of all processors since they started, without what other guests of the same machine took."""
    user, nice, system, _idle, _wait, irq, softirq = map(int, stat.read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
