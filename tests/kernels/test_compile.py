"""Every kernel compiles for every dtype on the GPUs we name, spills nothing, takes what the table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ["sm_80", "sm_90", "gfx942"]
DTYPES = ["fp32", "fp16", "bf16"]
KERNELS = ["shrink", "norm+shrink", "silu+shrink", "expand", "linear+expand", "lookup", "copy_pages"]
RESOURCES = Path(__file__).parents[2] / "kernels/resources.jsonl"
ATTENTION = [f"{kernel}_{dim}" for kernel in ("prefill", "decode", "combine") for dim in (64, 128, 256)]
MOST_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""What each gives one block."""


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_as_the_table_says(target: str, pytestconfig: pytest.Config) -> None:
    # A process of its own: whether Triton interprets or compiles is one switch for all of a process. Its cache goes by
    # the source and is kept: only what changed is compiled again.
    cache = pytestconfig.cache
    assert cache is not None
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_CACHE_DIR": str(cache.mkdir("triton")),
    }
    program = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(program), target], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr

    version, *compiled = map(json.loads, run.stdout.splitlines())
    names = {(each["kernel"], each["dtype"]) for each in compiled}
    assert names >= {(kernel, dtype) for kernel in KERNELS for dtype in DTYPES} | {("work_list", "fp32")}
    assert target == "gfx942" or names >= {(kernel, "bf16") for kernel in ATTENTION}
    for each in compiled:
        assert each["spilled_bytes"] == 0, each
        assert each["shared_bytes"] <= MOST_SHARED_BYTES[target], each
    table_version, *table = map(json.loads, RESOURCES.read_text().splitlines())
    if version == table_version:
        assert compiled == [each for each in table if each["target"] == target], f"{program.name} writes the table anew"
