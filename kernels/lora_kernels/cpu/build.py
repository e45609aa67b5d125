"""Finds the compiled backend, or compiles it: one library per instruction set, from the same source.

A library's name holds the hash of its source and of how it is compiled, so a stale one is never loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

SOURCE = Path(__file__).parent / "src"
PREBUILT = Path(__file__).parent / "prebuilt"
"""Where the package's build puts the libraries."""

_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

_AVX512_BF16 = {*_AVX512, "avx512_bf16"}

LEVELS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "amx": (("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"), {*_AVX512_BF16, "amx_tile", "amx_bf16"}),
    "avx512bf16": (("-march=x86-64-v4", "-mavx512bf16"), _AVX512_BF16),
    "avx512": (("-march=x86-64-v4",), _AVX512),
    "avx2": (("-march=x86-64-v3",), {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
    "portable": ((), set()),
}
"""The compiler's flags and what the processor must have, best first. Portable is whatever the compiler makes for."""

FLAGS = ("-std=c++20", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", "-fno-math-errno", "-Wno-psabi")
"""No -ffast-math: NaN and infinity keep their meaning, and sums their order."""


class UnavailableError(Exception):
    """There is no library for this machine and no way to make one; the message says why."""


def level_of_this_machine() -> str:
    """The best of `LEVELS` that this processor runs."""
    return _best_level(_processor_flags())


def library_name(level: str) -> str:
    """The file that the present source becomes."""
    digest = hashlib.sha256(" ".join((platform.machine(), *FLAGS, *LEVELS[level][0])).encode())
    for file in sorted(SOURCE.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"multilora-cpu-{level}-{digest.hexdigest()[:16]}.so"


def compile_library(
    level: str, to: Path, *, source: Path = SOURCE / "step.cpp", extra_flags: Sequence[str] = ()
) -> None:
    """Compile for a level. Raises UnavailableError when there is no compiler, or it fails."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UnavailableError("there is no C++ compiler; install g++ for the fast path")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as scratch:
        made = Path(scratch) / to.name
        command = [compiler, *FLAGS, *LEVELS[level][0], *extra_flags, str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UnavailableError(f"{compiler} does not compile the backend: {done.stderr.strip()[-2000:]}")
        made.replace(to)  # at once: another process may be waiting for it


@functools.cache
def load_library(level: str = "") -> ctypes.CDLL:
    """The library for this machine ('' is its best level): as packaged, from the user's cache, or compiled now.

    Raises UnavailableError.
    """
    level = level or level_of_this_machine()
    name = library_name(level)
    packaged, cached = PREBUILT / name, _cache_dir() / name
    if not packaged.exists() and not cached.exists():
        try:
            compile_library(level, cached)
        except OSError as error:
            raise UnavailableError(f"the backend cannot be compiled: {error}") from error
    try:
        return _declared(ctypes.CDLL(str(packaged if packaged.exists() else cached)))
    except OSError as error:
        raise UnavailableError(f"the compiled backend does not load: {error}") from error


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, arguments, result in (
        ("multilora_open", (pointer, integer, integer), pointer),
        ("multilora_step", (pointer, pointer), integer),
        ("multilora_close", (pointer,), None),
        ("multilora_pack", (pointer, long, long, pointer, integer), None),
        ("multilora_compress", (pointer, long, long, pointer), integer),
        ("multilora_quantise", (pointer, long, long, pointer, integer), None),
        ("multilora_keep", (pointer, pointer, pointer, long, long, pointer, integer), None),
        ("multilora_keeps_blocks", (integer,), integer),
        ("multilora_packed_bytes", (long, long, integer, long), long),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def _cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "multilora"


def _processor_flags() -> frozenset[str]:
    """What Linux says the processor has, as far as it is of use here; nothing where it says nothing."""
    try:
        return _of_use(Path("/proc/cpuinfo").read_text(), _may_use_tiles)
    except OSError:
        return frozenset()


def _of_use(cpuinfo: str, may_use_tiles: Callable[[], bool]) -> frozenset[str]:
    said = dict(line.replace("\t", "").split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    flags = frozenset(said.get("flags", "").split())
    if "amx_tile" in flags and not may_use_tiles():
        flags -= {"amx_tile"}
    if said.get("vendor_id", "").strip() == "GenuineIntel" and "amx_tile" not in flags:
        flags -= {"avx512_bf16"}  # slower there than float32: see kernels/README.md
    return flags


def _best_level(flags: Collection[str]) -> str:
    return next(level for level, (_, needed) in LEVELS.items() if needed.issubset(flags))


def _may_use_tiles() -> bool:
    """Ask for the registers of AMX, which Linux gives on request, to a whole process."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0)
