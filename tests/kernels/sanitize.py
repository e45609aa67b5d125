"""Runs the compiled backend's tests on libraries that AddressSanitizer and UndefinedBehaviorSanitizer watch.

    python -m tests.kernels.sanitize [pytest's arguments]

The libraries go into a cache directory of the run's own, under the names that the backend looks for; the sanitizer's
runtime is loaded ahead of Python, which is not built with it. Python's own leaks are not looked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_kernels.cpu.build import LEVELS, compile_library, level_of_this_machine, library_name

FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def main() -> int:
    runnable = list(LEVELS)[list(LEVELS).index(level_of_this_machine()) :]
    with tempfile.TemporaryDirectory() as cache:
        for level in runnable:
            compile_library(level, Path(cache) / "multilora" / library_name(level), extra_flags=FLAGS)
        environment = os.environ | {
            "XDG_CACHE_HOME": cache,
            "LD_PRELOAD": " ".join(_runtime(name) for name in ("libasan.so", "libstdc++.so")),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        tests = ["tests/kernels/test_cpu_step.py", *sys.argv[1:]]
        return subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], env=environment, check=False).returncode


def _runtime(name: str) -> str:
    """Where the compiler keeps a runtime library."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
