"""Compile every kernel for every dtype and some GPUs, without a GPU, and print what each takes as a JSON line.

    python tests/kernels/compile_kernels.py sm_80 sm_90 gfx942 > kernels/resources.jsonl

The constants are those that the kernels are launched with: the defaults, and what `tuned.json` holds beside them. The
first line names Triton's version, which decides what a kernel takes. Triton's interpreter must be off.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attention_kernels import tile_tokens, triton_attention
from attention_kernels.triton_path import constants_of
from lora_kernels import (
    PAGE_ROWS,
    triton_embed,
    triton_expand,
    triton_linear,
    triton_pool,
    triton_shrink,
    triton_work_list,
)
from lora_kernels.tuning import TABLE, entries
from lora_kernels.work_list import TILE_ROWS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TILES = {"SPLITS": triton_shrink.MOST_SPLITS, "TILE_ROWS": TILE_ROWS, "PAGE_ROWS": PAGE_ROWS}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HEAD_DIMS = (64, 128, 256)
HEADS = (32, 8)
"""Of queries and of keys, as Llama-3.1-8B has them."""

POINTERS = {
    "fp32": {"shrunk", "scales", "sums", "stats"},
    "i32": {"packed", "order", "tiles", "items", "counts", "page_table", "ranks", "block_tables", "positions"},
    "i64": {"copies", "token_ids"},
}
VALUE_POINTERS = {"x", "gain", "produced", "a", "y", "b0", "b1", "b2", "weight", "pool", "staged"}
VALUE_POINTERS |= {"q", "keys", "values", "out"}
FLOATS = {"eps", "scale"}
COUNTS = {"slots", "max_pages", "rows", "tile_capacity", "item_capacity", "count"}
COUNTS |= {"table_stride", "tile_count", "parts", "heads"}
"""Numbers of any value; all others are sizes and strides that a launch finds to be multiples of 16."""


class Variant(NamedTuple):
    """One way to launch a kernel."""

    name: str
    kernel: Any
    constants: Mapping[str, object]
    options: Mapping[str, object]


def variants(dtype: str, target: str) -> Iterator[Variant]:
    """Every kernel as it is launched for this dtype; those that meet no values of it go with fp32."""
    precision = triton_expand.precision_of(DTYPES[dtype], amd=target.startswith("gfx"))
    shrink = {**TILES, "BLOCK_K": triton_shrink.block_k_of(DTYPES[dtype]), "CHUNK": triton_shrink.CHUNK, "INPUT": "x"}
    expand = {**TILES, "BLOCK_N": triton_expand.BLOCK_N, "PRECISION": precision}
    yield Variant("shrink", triton_shrink.shrink_kernel, shrink, triton_shrink.LAUNCH)
    yield Variant("norm+shrink", triton_shrink.shrink_kernel, {**shrink, "INPUT": "norm"}, triton_shrink.LAUNCH)
    yield Variant("silu+shrink", triton_shrink.shrink_kernel, {**shrink, "INPUT": "silu"}, triton_shrink.LAUNCH)
    yield Variant("expand", triton_expand.expand_kernel, expand, triton_expand.LAUNCH)
    linear = {"BLOCK_K": triton_linear.BLOCK_COLUMNS[DTYPES[dtype]], "BLOCK_N": triton_linear.BLOCK_N}
    yield Variant("linear+expand", triton_linear.linear_expand_kernel, {**expand, **linear}, triton_linear.LAUNCH)
    lookup = {"TILE_ROWS": TILE_ROWS, "PAGE_ROWS": PAGE_ROWS}
    yield Variant("lookup", triton_embed.lookup_kernel, lookup, triton_embed.LAUNCH)
    pages = {"PAGE_ROWS": PAGE_ROWS, "BLOCK": triton_pool.BLOCK, "ALIGNMENT": triton_pool.ALIGNMENT}
    yield Variant("copy_pages", triton_pool.copy_pages_kernel, pages, triton_pool.LAUNCH)
    if dtype == "fp32":
        slots_block = 64
        lists = {
            "TILE_ROWS": TILE_ROWS,
            "BLOCK": triton_work_list.BLOCK,
            "CHUNK": triton_work_list.chunk_of(slots_block),
            "SLOTS_BLOCK": slots_block,
        }
        yield Variant("work_list", triton_work_list.work_list_kernel, lists, triton_work_list.LAUNCH)
    if dtype == "bf16" and target.startswith("sm_"):  # fp16 takes the same; float32 spills, and no GPU is served it
        for head_dim in HEAD_DIMS:
            yield from _attention(DTYPES[dtype], head_dim)
    yield from _tuned(dtype, {"shrink": shrink, "expand": expand})


def _attention(dtype: torch.dtype, head_dim: int) -> Iterator[Variant]:
    heads, kv_heads = HEADS
    for name, tokens in (("prefill", tile_tokens(heads, kv_heads)), ("decode", 1)):
        constants = constants_of(head_dim, heads // kv_heads, tokens)
        launch = triton_attention.launch_of(constants["HEAD_BLOCK"], dtype.itemsize)
        yield Variant(f"{name}_{head_dim}", triton_attention.attention_kernel, constants, launch)
    parts = {key: constants[key] for key in ("HEAD_DIM", "HEAD_BLOCK", "PART_KEYS")}
    yield Variant(f"combine_{head_dim}", triton_attention.combine_kernel, parts, triton_attention.COMBINE_LAUNCH)


def _tuned(dtype: str, defaults: Mapping[str, Mapping[str, object]]) -> Iterator[Variant]:
    """What the table of tuned constants launches beside the defaults, each once."""
    kernels = {"shrink": triton_shrink.shrink_kernel, "expand": triton_expand.expand_kernel}
    seen = set()
    for entry in entries(TABLE):
        for dealing in entry["dealing"].values() if DTYPES[dtype] is getattr(torch, entry["dtype"]) else ():
            chosen = {**entry["sums"], **dealing}
            chosen.pop("programs", None)
            name = " ".join([entry["kernel"], *(f"{key}={value}" for key, value in sorted(chosen.items()))])
            if name not in seen:
                seen.add(name)
                launch = {key: chosen.pop(key) for key in ("num_warps", "num_stages") if key in chosen}
                constants = {**defaults[entry["kernel"]], **{key.upper(): value for key, value in chosen.items()}}
                yield Variant(name, kernels[entry["kernel"]], constants, {**triton_shrink.LAUNCH, **launch})


def compile_variant(variant: Variant, dtype: str, target: str) -> Any:
    """Compile for aligned tensors of usual sizes, as a launch would specialise it."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, name in enumerate(variant.kernel.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        pointers = [f"*{of}" for of, names in [(dtype, VALUE_POINTERS), *POINTERS.items()] if name in names]
        signature[name] = pointers[0] if pointers else "fp32" if name in FLOATS else "i32"
        if name not in COUNTS | FLOATS:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, dict(variant.constants), attributes)
    return triton.compile(source, target=TARGETS[target], options=dict(variant.options))


def resources(compiled: Any) -> dict[str, int]:
    """Registers and spilled bytes of a thread, shared memory of a block in bytes."""
    registers, spilled = _amd_usage(compiled) if "amdgcn" in compiled.asm else _nvidia_usage(compiled)
    return {"registers": registers, "spilled_bytes": spilled, "shared_bytes": compiled.metadata.shared}


def _nvidia_usage(compiled: Any) -> tuple[int, int]:
    """Spilled registers go to the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(compiled: Any) -> tuple[int, int]:
    """Vector registers, of which a thread has up to 512; the private segment is the stack."""
    listing = compiled.asm["amdgcn"]
    found = {
        key: int(value) for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", listing)
    }
    return found["vgpr_count"], found["private_segment_fixed_size"]


def main(targets: list[str]) -> None:
    print(json.dumps({"triton": triton.__version__}))
    for target in targets:
        for dtype in DTYPES:
            for variant in variants(dtype, target):
                taken = resources(compile_variant(variant, dtype, target))
                print(json.dumps({"kernel": variant.name, "dtype": dtype, "target": target, **taken}))


if __name__ == "__main__":
    main(sys.argv[1:])
