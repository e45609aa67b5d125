"""How fast this machine reads memory: a small C loop, compiled for the run."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np

from services.common.errors import FailedPrecondition

SOURCE = Path(__file__).with_name("read_bandwidth.c")
MEGABYTES = 512
"""Far past any cache."""
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
        memory = np.ones(MEGABYTES * 1_000_000 + _LINE_BYTES, np.uint8)
        start = -memory.ctypes.data % _LINE_BYTES
        self._memory = memory[start : start + MEGABYTES * 1_000_000 // 256 * 256]

    def measure(self) -> float:
        """Bytes a second, of one pass."""
        began = time.perf_counter()
        self._read(self._memory.ctypes.data, self._memory.nbytes, self._threads)
        return self._memory.nbytes / (time.perf_counter() - began)
