"""How fast this machine reads memory: a small C loop, compiled for the run."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np

from services.common.errors import FailedPrecondition

SOURCE = Path(__file__).with_name("read_bandwidth.c")
PASS_BYTES = 96 << 20
"""Milliseconds, as a step takes: what slows one down slows its neighbour too."""
PASSES = 6
"""Passes over different memory before any is read again: far past any cache."""
_LINE_BYTES = 64


class ReadBandwidth:
    """Built once; `measure` may then be called between what it is compared with."""

    def __init__(self, directory: Path, threads: int) -> None:
        """Compile into `directory`. Raises FailedPrecondition without a C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise FailedPrecondition("COMPILER_MISSING", "the read bandwidth is measured in C; install gcc")
        library = directory / "read_bandwidth.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
        self._read = ctypes.CDLL(str(library)).read_all
        self._read.restype = ctypes.c_uint64
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._threads = threads
        self._memory = np.ones(PASSES * PASS_BYTES + _LINE_BYTES, np.uint8)
        first = self._memory.ctypes.data + -self._memory.ctypes.data % _LINE_BYTES
        self._starts = itertools.cycle(range(first, first + PASSES * PASS_BYTES, PASS_BYTES))

    def measure(self) -> float:
        """Bytes a second, of one short pass."""
        start, began = next(self._starts), time.perf_counter()
        self._read(start, PASS_BYTES, self._threads)
        return PASS_BYTES / (time.perf_counter() - began)
