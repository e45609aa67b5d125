"""Compile every kernel for every dtype and some GPUs, without a GPU, and print what each takes as a JSON line.

    python tests/kernels/compile_kernels.py sm_80 sm_90

The constants are those `lora_kernels.triton_path` launches with. Triton's interpreter must be off.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_kernels import PAGE_ROWS, triton_expand, triton_shrink, triton_work_list
from lora_kernels.work_list import TILE_ROWS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TILES = {"SPLITS": triton_shrink.MOST_SPLITS, "TILE_ROWS": TILE_ROWS, "PAGE_ROWS": PAGE_ROWS}

VALUE_POINTERS = {"x", "gain", "produced", "a", "y", "b0", "b1", "b2"}
FLOAT32_POINTERS = {"shrunk", "scales"}
INT32_POINTERS = {"packed", "order", "tiles", "items", "counts", "page_table", "ranks"}
COUNTS = {"slots", "max_pages", "rows", "tile_capacity", "item_capacity"}
"""Integers of any value; all others are sizes and strides that a launch finds to be multiples of 16."""


def compile_kernel(
    kernel: Any, dtype: str, target: str, constants: Mapping[str, object], options: Mapping[str, object]
) -> Any:
    """Compile for aligned tensors of usual sizes, as a launch would specialise it."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in VALUE_POINTERS:
            signature[name] = f"*{dtype}"
        elif name in FLOAT32_POINTERS:
            signature[name] = "*fp32"
        elif name in INT32_POINTERS:
            signature[name] = "*i32"
        elif name == "eps":
            signature[name] = "fp32"
            continue
        else:
            signature[name] = "i32"
        if name not in COUNTS:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, dict(constants), attributes)
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return triton.compile(source, target=gpu, options=dict(options))


def resources(compiled: Any) -> dict[str, int]:
    """Registers and stack of a thread (spilled registers go to the stack), shared memory of a block in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
    }


def main(targets: list[str]) -> None:
    for target in targets:
        for name, dtype in DTYPES.items():
            compiled = {
                "shrink": compile_kernel(
                    triton_shrink.shrink_kernel,
                    name,
                    target,
                    {**TILES, "BLOCK_K": triton_shrink.block_k_of(dtype), "CHUNK": 1024, "INPUT": "x"},
                    triton_shrink.LAUNCH,
                ),
                "expand": compile_kernel(
                    triton_expand.expand_kernel,
                    name,
                    target,
                    {**TILES, "BLOCK_N": triton_expand.BLOCK_N, "PRECISION": triton_expand.precision_of(dtype)},
                    triton_expand.LAUNCH,
                ),
            }
            if name == "fp32":
                slots_block = 64
                constants = {
                    "TILE_ROWS": TILE_ROWS,
                    "BLOCK": triton_work_list.BLOCK,
                    "CHUNK": triton_work_list.chunk_of(slots_block),
                    "SLOTS_BLOCK": slots_block,
                }
                kernel = triton_work_list.work_list_kernel
                compiled["work_list"] = compile_kernel(kernel, name, target, constants, triton_work_list.LAUNCH)
            for kernel, binary in compiled.items():
                print(json.dumps({"kernel": kernel, "dtype": name, "target": target, **resources(binary)}))


if __name__ == "__main__":
    main(sys.argv[1:])
