"""Engine steps on a GPU, of a model with Llama-3.1-8B's shape and random weights: what adapters add to them.

    python -m services.bench.engine.gpu [--out kernels/bench/results/engine.jsonl]
    python -m services.bench.engine.gpu --device cpu    a tiny model, every case once, no times: does it run

Decode in CUDA graphs, base and LoRA in turn, so that each ratio is of one run; prefill; growth of the context; loads
into the pool, each until the device has it, and steps while others load. A JSON line a case, beside what the device's
copies reach in the same run; in the end a table beside gates and aims, to standard error. η is the time that reading
the adapters takes at that bandwidth ÷ the time they add.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.bench.gates import engine_gates, table
from services.bench.quantile import quantile
from services.inference.adapters.packed_adapter import ModuleTensors
from services.inference.adapters.slot_pool import SlotPool
from services.inference.engine.interfaces import ScheduledRequest
from services.inference.engine.request import Request, SamplingParams, StoppingParams
from services.inference.model.attention import KVCache
from services.inference.model.config import ModelConfig, RopeScaling
from services.inference.model.decoder import Decoder
from services.inference.model.gpu_runner import GpuRunner, cuda_graphs
from services.inference.model.lora import LINEAR_GROUPS, group_shapes
from services.inference.model.sampler import Sampler
from services.inference.model.weights import expected_shapes

BLOCK_SIZE = 16
STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, and how much of everything is measured; 54 GB of the larger one.

    context: of decode; contexts: of batch `middle`, for growth; prompt: tokens of a prefill
    distinct: adapters in a batch; steps: of a measurement; rounds: of everything that is compared
    """

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    batches: Sequence[int]
    middle: int
    distinct: Sequence[int]
    ranks: Sequence[int]
    context: int
    contexts: Sequence[int]
    prompt: int
    steps: int
    rounds: int


LLAMA_8B = Shape(
    vocab=128_256,
    hidden=4096,
    inner=14_336,
    layers=32,
    heads=32,
    kv_heads=8,
    batches=(1, 8, 64, 256),
    middle=64,
    distinct=(1, 4, 16, 64),
    ranks=(8, 16, 32, 64),
    context=512,
    contexts=(512, 1024, 2048),
    prompt=8192,
    steps=20,
    rounds=7,
)
TINY = Shape(
    vocab=256,
    hidden=128,
    inner=192,
    layers=2,
    heads=2,
    kv_heads=1,
    batches=(1, 3),
    middle=3,
    distinct=(1, 3),
    ranks=(8, 16),
    context=20,
    contexts=(20, 40),
    prompt=48,
    steps=1,
    rounds=1,
)


class RandomAdapter:
    """Every linear at one rank, all layers the same run of bytes, pinned where there is a device to copy to."""

    def __init__(self, digest: str, model: ModelConfig, rank: int, pinned: bool) -> None:
        self.digest = digest
        self.ranks: dict[str, int] = {}
        self._modules: dict[str, ModuleTensors] = {}
        widths: dict[str, tuple[int, int]] = {}
        for group, shape in group_shapes(model).items():
            for linear, out in zip(LINEAR_GROUPS[group], shape.out_features, strict=True):
                self.ranks[linear] = rank
                widths[linear] = shape.in_features, out
        values = _random((rank, sum(map(sum, widths.values()))), model.dtype).flatten()
        values = values.pin_memory() if pinned else values
        parts = iter(torch.split(values, [rank * width for each in widths.values() for width in each]))
        for linear in widths:
            a, b = next(parts).view(rank, -1), next(parts).view(rank, -1)
            self._modules[linear] = ModuleTensors(rank, 1.0, a, b)
        self._run = values.view(torch.uint8)
        self.num_bytes = model.num_layers * self._run.nbytes

    def module(self, _layer: int, linear: str) -> ModuleTensors:
        return self._modules[linear]

    def run(self, _layer: int) -> Tensor:
        return self._run


class Bench:
    """A runner over a pool, stepped without an engine."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device = shape, device
        steps = shape.steps + 2
        self.model = ModelConfig(
            name="random",
            architecture="LlamaForCausalLM",
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.hidden // shape.heads,
            rms_norm_eps=1e-5,
            rope_theta=500_000.0,
            rope_scaling=RopeScaling(),
            tie_word_embeddings=False,
            max_model_len=max(*shape.contexts, shape.prompt) + steps,
            eos_token_ids=frozenset(),
            dtype_name=str(dtype).removeprefix("torch."),
            hf_config={},
        )
        weights = {name: _random(size, dtype).to(device) for name, size in expected_shapes(self.model).items()}
        self.weight_bytes = sum(w.nbytes for name, w in weights.items() if "embed_tokens" not in name)
        decoder = Decoder(self.model, weights)
        del weights
        slots = max(shape.distinct)
        self.pool = SlotPool(group_shapes(self.model), shape.layers, slots, max(shape.ranks), dtype, device=device)
        contexts = [(batch, shape.context) for batch in shape.batches] + [(1, shape.prompt)]
        contexts += [(shape.middle, context) for context in shape.contexts]
        blocks = 1 + max(batch * blocks_for(context + steps) for batch, context in contexts)
        cache = KVCache(shape.layers, blocks, BLOCK_SIZE, shape.kv_heads, self.model.head_dim, dtype, device)
        self.runner = GpuRunner(
            decoder,
            cache,
            self.pool,
            Sampler(),
            max_num_seqs=max(shape.batches),
            capture=cuda_graphs() if device.type == "cuda" else None,
        )

    def seconds(self, work: Callable[[], object]) -> float:
        """Until the device has done it."""
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def load(self, count: int, rank: int) -> tuple[int, list[float]]:
        """Fill that many slots: bytes of an adapter, seconds of each load."""
        for slot in list(self.pool.slots()):
            self.pool.evict(slot.digest)
        adapter = RandomAdapter("", self.model, rank, self.device.type == "cuda")
        taken = []
        for number in range(count):
            adapter.digest = str(number)
            taken.append(self.seconds(lambda: self.pool.wait({self.pool.load(adapter).index})))
        return adapter.num_bytes, taken

    def decode(self, batch: int, distinct: int, context: int) -> float:
        """Seconds of a step, the mean of `steps`, the first not counted."""
        step = self._requests(batch, distinct, context, computed=context - 1)
        taken = [self._step(step) for _ in range(self.shape.steps + 1)]
        return statistics.mean(taken[1:])

    def steps_beside(self, adapter: RandomAdapter | None) -> list[float]:
        """Seconds of decode steps, each until its tokens are read, while an adapter is loaded again and again."""
        requests = self._requests(self.shape.middle, 1, self.shape.context, computed=self.shape.context - 1)
        return [self._step_beside(requests, adapter) for _ in range(self.shape.steps + 1)][1:]

    def _step_beside(self, requests: list[tuple[Request, int | None]], adapter: RandomAdapter | None) -> float:
        began = time.perf_counter()
        for error in self.pool.poll().values():
            raise error
        if adapter is not None and ((slot := self.pool.get(adapter.digest)) is None or slot.arrived):
            if slot is not None:
                self.pool.evict(slot.digest)
            self.pool.load(adapter)
        self._launch(requests)
        return time.perf_counter() - began

    def prefill(self, distinct: int) -> float:
        return self._step(self._requests(1, distinct, self.shape.prompt, computed=0))

    def _requests(self, batch: int, distinct: int, context: int, *, computed: int) -> list[tuple[Request, int | None]]:
        """Contexts that nobody computed: zeros. Blocks are each request's own."""
        slots = [slot.index for slot in self.pool.slots()][:distinct]
        each = blocks_for(context + self.shape.steps + 2)
        made: list[tuple[Request, int | None]] = []
        for number in range(batch):
            request = Request(str(number), [7] * context, SamplingParams(), StoppingParams(max_tokens=1 << 20))
            request.num_computed_tokens = computed
            request.block_ids = list(range(1 + number * each, 1 + (number + 1) * each))
            made.append((request, slots[number % distinct] if distinct else None))
        return made

    def _step(self, requests: list[tuple[Request, int | None]]) -> float:
        return self.seconds(lambda: self._launch(requests))

    def _launch(self, requests: list[tuple[Request, int | None]]) -> None:
        step = [ScheduledRequest(request, request.num_uncomputed_tokens, slot) for request, slot in requests]
        self.runner.launch(step).read()
        for request, _ in requests:
            request.num_computed_tokens = len(request.token_ids)
            request.token_ids.append(7)

    def copy_bandwidth(self) -> float:
        """Bytes read and written a second by a copy within the device."""
        source = torch.empty(1 << (30 if self.device.type == "cuda" else 20), dtype=torch.uint8, device=self.device)
        to = torch.empty_like(source)
        return 2 * source.nbytes / min(self.seconds(lambda: to.copy_(source)) for _ in range(5))


def loading(bench: Bench) -> dict[str, Any]:
    """Decode steps while an adapter is loaded again and again, and without, in turn: p99 ÷ p99."""
    shape = bench.shape
    bench.load(max(shape.distinct) - 1, 16)
    adapter = RandomAdapter("coming and going", bench.model, 16, bench.device.type == "cuda")
    taken: dict[bool, list[float]] = {False: [], True: []}
    for number in range(shape.rounds + 1):
        for loads, steps in taken.items():
            found = bench.steps_beside(adapter if loads else None)
            if number:
                steps += found
    quiet, beside_loads = (quantile(steps, 0.99) for steps in taken.values())
    about = {"case": "loading", "batch": shape.middle, "adapters": 1, "rank": 16, "context": shape.context}
    return about | {"seconds_p99": beside_loads, "p99_of_quiet": beside_loads / quiet}


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def _random(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Not the same bytes again and again, and quickly made."""
    seed = torch.randn(1 << 16) * STD
    count = torch.Size(shape).numel()
    return seed.repeat(-(-count // len(seed)))[:count].view(*shape).to(dtype)


def cases(bench: Bench) -> Iterator[dict[str, Any]]:
    """Metrics of each case, times in seconds."""
    shape, rate = bench.shape, bench.copy_bandwidth()
    for rank in shape.ranks:
        adapter_bytes, loads = bench.load(max(shape.distinct), rank)
        yield {"case": "load", "rank": rank, "bytes": adapter_bytes} | spread("seconds", loads)
        points = [
            (batch, distinct) for batch in shape.batches for distinct in (0, *shape.distinct) if distinct <= batch
        ]
        found = in_turn(points, lambda point: bench.decode(point[0], point[1], shape.context), shape.rounds)
        for (batch, distinct), taken in found.items():
            yield {
                "case": "decode",
                "batch": batch,
                "adapters": distinct,
                "rank": rank,
                "context": shape.context,
                **spread("seconds", taken),
                **beside(taken, found[batch, 0], distinct * adapter_bytes / rate),
                "weights_floor_seconds": bench.weight_bytes / rate,
            }
        found = in_turn([(0,), (1,)], lambda point: bench.prefill(point[0]), shape.rounds)
        for (distinct,), taken in found.items():
            yield {
                "case": "prefill",
                "tokens": shape.prompt,
                "adapters": distinct,
                "rank": rank,
                **spread("seconds", taken),
                **beside(taken, found[0,], distinct * adapter_bytes / rate),
            }
    yield loading(bench)
    points = [(context, distinct) for context in shape.contexts for distinct in (0, 1)]
    found = in_turn(points, lambda point: bench.decode(shape.middle, point[1], point[0]), shape.rounds)
    for (context, distinct), taken in found.items():
        yield {
            "case": "growth",
            "batch": shape.middle,
            "adapters": distinct,
            "rank": max(shape.ranks),
            "context": context,
            **spread("seconds", taken),
            **beside(taken, found[context, 0], 0.0),
        }


def in_turn(
    points: Sequence[tuple[int, ...]], measure: Callable[[tuple[int, ...]], float], rounds: int
) -> dict[tuple[int, ...], list[float]]:
    """Each point once a round, so that all share whatever else the machine does; a first round only warms."""
    found: dict[tuple[int, ...], list[float]] = {point: [] for point in points}
    for number in range(rounds + 1):
        for point in points:
            taken = measure(point)
            if number:
                found[point].append(taken)
    return found


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def beside(taken: Sequence[float], base: Sequence[float], floor: float) -> dict[str, float]:
    """of_base: base time ÷ this one's, by round, the median; eta: see above, where there are adapters"""
    ratio = statistics.median(own / other for own, other in zip(base, taken, strict=True))
    extra = statistics.median(own - other for own, other in zip(taken, base, strict=True))
    return {"of_base": ratio} | ({"eta": floor / extra} if floor and extra > 0 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines to this; default: standard output")
    arguments = parser.parse_args()
    device, on_cpu = torch.device(arguments.device), arguments.device == "cpu"
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(TINY if on_cpu else LLAMA_8B, device, getattr(torch, arguments.dtype))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    name = platform.machine() if on_cpu else torch.cuda.get_device_name()
    results = []
    for case in cases(bench):
        setup = {key: case.pop(key) for key in list(case) if key in SETUP}
        setup |= {"dtype": arguments.dtype, "layers": bench.shape.layers, "hidden": bench.shape.hidden}
        setup |= {"capture_failures": bench.runner.capture_failures}
        line = {"setup": setup, "versions": versions, "device": name, "metrics": {} if on_cpu else case}
        results.append(line)
        text = json.dumps(line)
        if arguments.out is None:
            print(text, flush=True)
        else:
            with arguments.out.open("a") as out:
                out.write(text + "\n")
    print(f"{name}\n{table(engine_gates(results))}", file=sys.stderr)


SETUP = ("case", "batch", "adapters", "rank", "context", "tokens")


if __name__ == "__main__":
    main()
