"""Times the compiled CPU step on random weights of a model's shape, beside the memory bandwidth of the same run.

    python kernels/bench/cpu_step.py --dtype bfloat16 --threads 2 [--rounds 30] [--cases decode prefill long]

A JSON line a case: the median of `rounds`, every case taken once a round, with the quartiles as its spread.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lora_kernels import PAGE_ROWS, LoraWeights, PageTable
from lora_kernels.cpu import BlockWeights, CpuCache, CpuDecoder, DecoderShape, PackedLayer, Packer, StepBatch
from lora_kernels.cpu.build import compile_library, level_of_this_machine

SMOLLM2 = {"vocab": 49152, "hidden": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64}
LAYERS = 30
RANK = 16
SLOTS = 16
BLOCK = 16
CONTEXT = 4096


@dataclass(frozen=True)
class Case:
    """sequences x rows each, at a context, over so many distinct adapters (0: the base model)."""

    name: str
    sequences: int
    rows: int
    context: int
    adapters: int


CASES = {
    "decode": [
        Case("decode_b1_base", 1, 1, 128, 0),
        Case("decode_b1_1_adapter", 1, 1, 128, 1),
        Case("decode_b8_base", 8, 1, 128, 0),
        Case("decode_b8_8_adapters", 8, 1, 128, 8),
        Case("decode_b16_base", 16, 1, 128, 0),
        Case("decode_b16_1_adapter", 16, 1, 128, 1),
        Case("decode_b16_16_adapters", 16, 1, 128, 16),
    ],
    "prefill": [
        Case("prefill_8x64_base", 8, 64, 64, 0),
        Case("prefill_8x64_8_adapters", 8, 64, 64, 8),
    ],
    "long": [
        Case("decode_b1_context_4k", 1, 1, 4096, 0),
        Case("decode_b8_context_4k", 8, 1, 4096, 0),
        Case("prefill_512_ending_at_4k", 1, 512, 4096, 0),
    ],
}


def random_tensor(shape: Sequence[int], dtype: torch.dtype, std: float) -> torch.Tensor:
    """Not the same bytes again and again, and quickly made."""
    seed = torch.randn(1 << 16) * std
    count = int(np.prod(shape))
    return seed.repeat(-(-count // len(seed)))[:count].view(*shape).to(dtype)


def random_weights(out: int, width: int, dtype: torch.dtype, bits: int) -> torch.Tensor | BlockWeights:
    """Base weights, with 8 or 4 bits in a file's blocks."""
    if bits > 8:
        return random_tensor((out, width), dtype, 0.02)
    most = 2 ** (bits - 1)
    values = random_tensor((out, width), torch.float32, most / 3).clamp(-most, most - 1).to(torch.int8)
    scales = torch.full((out, width // 32), 2.0**-6 / most)
    return BlockWeights(values, scales) if bits == 8 else BlockWeights(values + 8, scales, -8 * scales)


def build(dtype: torch.dtype, threads: int, bits: int = 16) -> tuple[CpuDecoder, dict[str, float]]:
    shape = DecoderShape(**SMOLLM2, norm_eps=1e-5, dtype=dtype)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = [(q, shape.hidden), (kv, shape.hidden), (kv, shape.hidden), (shape.hidden, q)]
    sizes += [(shape.inner, shape.hidden)] * 2 + [(shape.hidden, shape.inner)]
    groups = {"qkv": sizes[:3], "o": sizes[3:4], "gate_up": sizes[4:6], "down": sizes[6:]}
    raw = [[random_weights(*size, dtype, bits) for size in sizes] for _ in range(LAYERS)]
    raw_head = random_weights(shape.vocab, shape.hidden, dtype, max(bits, 8))
    packer, started = Packer(dtype), time.perf_counter()
    layers = [
        PackedLayer(torch.ones(shape.hidden), torch.ones(shape.hidden), tuple(packer.pack(w) for w in weights))
        for weights in raw
    ]
    head = packer.pack(raw_head)
    packing = time.perf_counter() - started
    pages = torch.arange(SLOTS, dtype=torch.int32)[:, None]
    tables = {
        name: PageTable(torch.stack([pages] * len(of)).contiguous(), [[(s,) for s in range(SLOTS)]] * len(of), 256)
        for name, of in groups.items()
    }
    lora = [
        {
            name: LoraWeights(
                name,
                random_tensor((len(of), SLOTS * PAGE_ROWS, of[0][1]), dtype, 0.02),
                tuple(random_tensor((SLOTS * PAGE_ROWS, out), dtype, 0.02) for out, _ in of),
                torch.full((len(of), SLOTS), RANK, dtype=torch.int32),
                torch.ones((len(of), SLOTS)),
            )
            for name, of in groups.items()
        }
        for _ in range(LAYERS)
    ]
    blocks = 8 * CONTEXT // BLOCK
    cache = CpuCache(
        torch.zeros((LAYERS, blocks, shape.kv_heads, shape.head_dim, BLOCK), dtype=dtype),
        torch.zeros((LAYERS, blocks, shape.kv_heads, BLOCK, shape.head_dim), dtype=dtype),
    )
    angles = torch.outer(torch.arange(CONTEXT).float(), 1e-5 ** (torch.arange(32) / 32))
    decoder = CpuDecoder(
        shape,
        layers,
        norm=torch.ones(shape.hidden),
        head=head,
        embedding=None,
        cosines=angles.cos(),
        sines=angles.sin(),
        cache=cache,
        lora=lora,
        tables=tables,
        threads=threads,
    )
    adapter = sum(RANK * (i + o) for of in groups.values() for o, i in of) * LAYERS * dtype.itemsize
    return decoder, {"weight_bytes": decoder.weight_bytes, "adapter_bytes": adapter, "packing_s": packing}


def batch_of(case: Case) -> StepBatch:
    rows, per = case.sequences * case.rows, -(-case.context // BLOCK)
    sequences = np.repeat(np.arange(case.sequences, dtype=np.int32), case.rows)
    slots = sequences % case.adapters if case.adapters else np.full(rows, -1)
    first = case.context - case.rows
    return StepBatch(
        tokens=np.random.default_rng(0).integers(0, SMOLLM2["vocab"], rows).astype(np.int32),
        positions=np.tile(np.arange(first, case.context, dtype=np.int32), case.sequences),
        slots=np.sort(slots).astype(np.int32) if case.rows == 1 else slots.astype(np.int32),
        sequences=sequences,
        block_tables=np.arange(case.sequences * per, dtype=np.int32).reshape(case.sequences, per),
        sampled_rows=np.arange(case.rows - 1, rows, case.rows, dtype=np.int32),
    )


def reader(threads: int) -> Callable[[], float]:
    """Reads a gigabyte; bytes a second."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "read.so"
        compile_library(level_of_this_machine(), path, source=Path(__file__).parent / "read.cpp")
        library = ctypes.CDLL(str(path))
    library.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    memory = np.ones(1 << 30, np.uint8)

    def read() -> float:
        started = time.perf_counter()
        library.read_memory(memory.ctypes.data, memory.nbytes, threads)
        return memory.nbytes / (time.perf_counter() - started)

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cases", nargs="+", default=["decode", "prefill"], choices=list(CASES))
    parser.add_argument(
        "--bits", type=int, default=16, choices=[16, 8, 4], help="fewer: base weights in a file's blocks"
    )
    arguments = parser.parse_args()
    decoder, sizes = build(getattr(torch, arguments.dtype), arguments.threads, arguments.bits)
    read = reader(arguments.threads)
    cases = {case: batch_of(case) for name in arguments.cases for case in CASES[name]}
    times: dict[Case, list[float]] = {case: [] for case in cases}
    bandwidths = []
    for _ in range(arguments.rounds + 1):  # the first only warms
        bandwidths.append(read())
        for case, batch in cases.items():
            started = time.perf_counter()
            decoder.step(batch)
            times[case].append(time.perf_counter() - started)
    bandwidth = statistics.median(bandwidths[1:])
    for case, taken in times.items():
        low, middle, high = (1e3 * value for value in statistics.quantiles(taken[1:], n=4))
        floor = 1e3 * (sizes["weight_bytes"] + case.adapters * sizes["adapter_bytes"]) / bandwidth
        print(
            json.dumps(
                {
                    "setup": {"case": case.name, **vars(arguments), "shape": SMOLLM2, "rank": RANK},
                    "versions": {"torch": torch.__version__, "python": platform.python_version()},
                    "device": {
                        "processor": platform.processor() or platform.machine(),
                        "level": level_of_this_machine(),
                    },
                    "metrics": {
                        "ms": round(middle, 3),
                        "ms_quartiles": [round(low, 3), round(high, 3)],
                        "floor_ms": round(floor, 3),
                        "read_gb_s": round(bandwidth / 1e9, 2),
                        **{name: round(value, 4) for name, value in sizes.items()},
                    },
                }
            )
        )


if __name__ == "__main__":
    main()
