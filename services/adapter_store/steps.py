"""Where a commit can be cut off. Tests kill the process at each step; outside of tests a step is nothing.

Every place after which something is durable that was not before calls `commit_step` with a name of its own.
tests/adapter_store/test_kill.py collects the names from the source, and fails for one that it does not kill at.
"""

from __future__ import annotations

import os
import signal

KILL_AT = "MULTILORA_TEST_KILL_AT"


def commit_step(name: str) -> None:
    if os.environ.get(KILL_AT) == name:
        os.kill(os.getpid(), signal.SIGKILL)
