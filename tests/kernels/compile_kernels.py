"""Compile every kernel for every dtype and some GPUs, without a GPU, and print what each takes as a JSON line.

    python tests/kernels/compile_kernels.py sm_80 sm_90

The constants are those that `triton_path` of either package launches with. Triton's interpreter must be off.
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

from attention_kernels import tile_tokens, triton_attention
from attention_kernels.triton_path import constants_of
from lora_kernels import PAGE_ROWS, triton_expand, triton_shrink, triton_work_list
from lora_kernels.work_list import TILE_ROWS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TILES = {"SPLITS": triton_shrink.MOST_SPLITS, "TILE_ROWS": TILE_ROWS, "PAGE_ROWS": PAGE_ROWS}

HEAD_DIMS = (64, 128, 256)
HEADS = (32, 8)
"""Of queries and of keys, as Llama-3.1-8B has them."""

VALUE_POINTERS = {"x", "a", "y", "b0", "b1", "b2", "q", "keys", "values", "out"}
FLOAT32_POINTERS = {"shrunk", "scales", "sums", "stats"}
INT32_POINTERS = {"packed", "order", "tiles", "items", "counts", "page_table", "ranks", "block_tables", "positions"}
FLOATS = {"scale"}
COUNTS = {
    "slots",
    "max_pages",
    "rows",
    "tile_capacity",
    "item_capacity",
    "table_stride",
    "tile_count",
    "parts",
    "heads",
}
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
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name not in COUNTS | FLOATS:
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


def compile_attention(name: str, dtype: torch.dtype, target: str, head_dim: int) -> dict[str, Any]:
    """bf16 alone: fp16 has the same resources, and float32, which spills, is what the interpreter tests."""
    heads, kv_heads = HEADS
    compiled = {}
    for kernel, tokens in (("prefill", tile_tokens(heads, kv_heads)), ("decode", 1)):
        constants = constants_of(head_dim, heads // kv_heads, tokens)
        options = triton_attention.launch_of(constants["HEAD_BLOCK"], dtype.itemsize)
        compiled[f"{kernel}_{head_dim}"] = compile_kernel(
            triton_attention.attention_kernel, name, target, constants, options
        )
    parts = {key: constants[key] for key in ("HEAD_DIM", "HEAD_BLOCK", "PART_KEYS")}
    compiled[f"combine_{head_dim}"] = compile_kernel(
        triton_attention.combine_kernel, name, target, parts, triton_attention.COMBINE_LAUNCH
    )
    return compiled


def main(targets: list[str]) -> None:
    for target in targets:
        for name, dtype in DTYPES.items():
            compiled = {
                "shrink": compile_kernel(
                    triton_shrink.shrink_kernel,
                    name,
                    target,
                    {**TILES, "BLOCK_K": triton_shrink.block_k_of(dtype)},
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
            if name == "bf16":
                for head_dim in HEAD_DIMS:
                    compiled |= compile_attention(name, dtype, target, head_dim)
            for kernel, binary in compiled.items():
                print(json.dumps({"kernel": kernel, "dtype": name, "target": target, **resources(binary)}))


if __name__ == "__main__":
    main(sys.argv[1:])
