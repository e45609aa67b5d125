"""Every kernel compiles for every dtype on the GPUs we name, spills nothing and leaves room for other blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ["sm_80", "sm_90"]
LORA = {(kernel, dtype) for kernel in ("shrink", "expand") for dtype in ("fp32", "fp16", "bf16")}
ATTENTION = {(f"{kernel}_{dim}", "bf16") for kernel in ("prefill", "decode", "combine") for dim in (64, 128, 256)}
MOST_SHARED_BYTES = 100 * 1024
"""Beneath the 163 KiB that sm_80 gives one block."""


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target: str, tmp_path: Path) -> None:
    # A process of its own: whether Triton interprets or compiles is one switch for all of a process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(tmp_path)}
    program = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(program), target], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr

    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    found = {(each["kernel"], each["dtype"]) for each in compiled}
    assert found == LORA | ATTENTION | {("work_list", "fp32")}
    for each in compiled:
        assert each["spilled_bytes"] == 0, each
        assert each["shared_bytes"] < MOST_SHARED_BYTES, each
