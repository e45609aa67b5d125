"""LoRA kernels at an 8B model's shapes, in CUDA graphs, beside the base alone, the bytes, and two peers' kernels.

    python -m kernels.bench.lora [--quick] [--rounds 15] [--peers fetch|none] [--device cuda|cpu]

A JSON line a case goes to `kernels/bench/results/`, a table against gates and aims to the terminal. Per layer: its four
linear groups, each a base matmul and what adds LoRA to it; *extra* is the graph with LoRA less the graph without, taken
in turns. The floor is the bytes of the adapters in the batch, each read once at the bandwidth of a copy in the same
run; eta is floor over extra. Ways with fewer launches make a group's base and LoRA together. `--device cpu` runs
everything once in Triton's interpreter, at small shapes, compares it with the reference, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

if {"cpu", "--device=cpu"} & set(sys.argv):  # decided when a kernel is decorated, so before any is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from kernels.bench import cuda, peers
from kernels.bench.cases import (
    LLAMA_8B,
    TINY,
    Case,
    Layer,
    active_set,
    adapter_bytes,
    build_layer,
    cases,
    page_tables,
    paged_weights,
)
from kernels.bench.gates import gates, table
from lora_kernels import LoraBatch, WorkList
from lora_kernels.reference import TOLERANCES, apply_lora_reference
from lora_kernels.triton_fused import linear_beside_shrink, linear_expand
from lora_kernels.triton_path import apply_lora_triton, empty_shrunk, shrink
from lora_kernels.triton_work_list import build_work_list

LAYERS = 4
"""Taken in turn within a graph, so that no layer finds its adapters in the second-level cache."""

INTERPRETED = (Case(5, 3, (8, 33)), Case(40, 2, (16,), segments=True))
CHECKED_ROWS = 8
PEER_TOLERANCE = 0.06
"""Peers round on the way, to 16 bits; this only says that what was timed computes LoRA."""


Way = Callable[[int, str], Tensor]
"""y of a layer's group: what the base linear and LoRA make of x."""


class Ours:
    """Our kernels over the case's layers, with a work list in fixed buffers."""

    def __init__(self, layers: list[Layer], case: Case, tables: Mapping[str, Any]) -> None:
        self._layers = layers
        self._weights = [paged_weights(layer, tables) for layer in layers]
        active = active_set(case, tables)
        row_slots = torch.tensor(case.row_slots, dtype=torch.int32, device=layers[0].x["o"].device)
        self._pages = active.pages_of_slot
        self._row_slots = case.row_slots
        self.work = WorkList.allocate(case.rows, case.adapters, max(self._pages), row_slots.device)
        self._batch = LoraBatch(row_slots, active, self.work)
        assert self.stage(), "fixed buffers hold every batch of so many rows"
        build_work_list(self.work)

    def stage(self) -> bool:
        """A step's host work, but for the launch that builds the list."""
        return self.work.stage(self._row_slots, self._pages)

    def __call__(self, index: int, group: str) -> None:
        layer = self._layers[index]
        apply_lora_triton(layer.y[group], layer.x[group], self._weights[index][group], self._batch)

    def ways(self) -> dict[str, Way]:
        """Those with fewer launches, or two at a time, that the device can run: a group's base and LoRA together."""
        ways: dict[str, Way] = {"linear_expand": self._linear_expand}
        if self.work.packed.is_cuda:
            side = torch.cuda.Stream()
            ways["linear_beside_shrink"] = lambda index, group: self._beside(index, group, side)
        return ways

    def _linear_expand(self, index: int, group: str) -> Tensor:
        x, weights = self._layers[index].x[group], self._weights[index][group]
        shrunk = empty_shrunk(x, weights, self.work)
        shrink(shrunk, x, weights, self._batch)
        return linear_expand(x, self._layers[index].base[group], shrunk, weights, self._batch)

    def _beside(self, index: int, group: str, side: torch.cuda.Stream) -> Tensor:
        layer, weights = self._layers[index], self._weights[index][group]
        return linear_beside_shrink(
            lambda x: torch.mm(x, layer.base[group].T, out=layer.y[group]), layer.x[group], weights, self._batch, side
        )


def check(name: str, apply: peers.Apply, layers: list[Layer], case: Case) -> None:
    """Compare every group of every layer with the reference, on some rows."""
    tolerances = None if name == "ours" else (PEER_TOLERANCE, PEER_TOLERANCE)
    for index, layer in enumerate(layers):
        for group, y in layer.y.items():
            before = y.clone()
            apply(index, group)
            compare(name, layer, group, before, y, case, tolerances)
            y.copy_(before)


def check_way(name: str, way: Way, layers: list[Layer], case: Case) -> None:
    """As `check`. What rounds at other places than the base and the pair do is held to the peers' tolerance."""
    for index, layer in enumerate(layers):
        for group, x in layer.x.items():
            base = x @ layer.base[group].T
            compare(name, layer, group, base, way(index, group), case, (PEER_TOLERANCE, PEER_TOLERANCE))


def compare(
    name: str, layer: Layer, group: str, base: Tensor, y: Tensor, case: Case, tolerances: tuple[float, float] | None
) -> None:
    """y of some rows with base and the adapters' part by the reference; tolerances: else our kernels' own."""
    rows = torch.linspace(0, case.rows - 1, min(case.rows, CHECKED_ROWS)).long().tolist()
    slots, row_slots = layer.adapters[group], [case.row_slots[row] for row in rows]
    outs = [one.b.shape[1] for one in slots[0]]
    expected = apply_lora_reference(base[rows], layer.x[group][rows], row_slots, dict(enumerate(slots)), outs)
    rtol, atol = tolerances or TOLERANCES[y.dtype]
    torch.testing.assert_close(y[rows].double(), expected, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


def host_us(stage: Callable[[], object], rounds: int = 200) -> float:
    """Median microseconds of the host's work for a step, once the copy before is done."""
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        stage()
        taken.append(time.perf_counter() - started)
    return 1e6 * statistics.median(taken)


def layer_graph(layers: list[Layer], *work: Callable[[int, str], object]) -> torch.cuda.CUDAGraph:
    """All groups of all layers, one after another; `work` of each, in order."""

    def run() -> None:
        for index, layer in enumerate(layers):
            for group in layer.x:
                for each in work:
                    each(index, group)

    return cuda.capture(run)


def measure(layers: list[Layer], applied: Mapping[str, Any], floor_us: float, rounds: int) -> dict[str, Any]:
    """Per layer, in microseconds: quartiles of each way with the base, and of LoRA alone."""

    def base(index: int, group: str) -> None:
        layer = layers[index]
        torch.mm(layer.x[group], layer.base[group].T, out=layer.y[group])

    ways = applied["ours"].ways()
    graphs = {"base": layer_graph(layers, base)}
    for name, apply in applied.items():
        graphs[name] = layer_graph(layers, base, apply)
        graphs[f"{name}_alone"] = layer_graph(layers, apply)
    graphs |= {name: layer_graph(layers, way) for name, way in ways.items()}
    graphs["work_list"] = cuda.capture(lambda: build_work_list(applied["ours"].work))
    taken = cuda.interleaved_us(graphs, rounds)
    work_list = statistics.median(taken.pop("work_list"))
    quartiles = {
        name: [round(each / len(layers), 3) for each in statistics.quantiles(of, n=4)] for name, of in taken.items()
    }
    metrics: dict[str, Any] = {"floor_us": round(floor_us, 3), "base_us": quartiles.pop("base")}
    for name in applied:
        extra = quartiles[name][1] - metrics["base_us"][1]
        metrics[name] = {
            "layer_us": quartiles[name],
            "alone_us": quartiles[f"{name}_alone"],
            "extra_us": round(extra, 3),
            "eta": round(floor_us / extra, 4) if extra > 0 else None,
        }
    for name in ways:
        extra = quartiles[name][1] - metrics["base_us"][1]
        metrics[name] = {"layer_us": quartiles[name], "extra_us": round(extra, 3)}
    metrics["ours"]["work_list_us"] = round(work_list, 3)
    metrics["ours"]["host_us"] = round(host_us(applied["ours"].stage), 2)
    return metrics


def run_case(case: Case, options: argparse.Namespace, sources: Path | None, bandwidth: float) -> dict[str, Any]:
    on_gpu = options.device == "cuda"
    shape, device = (LLAMA_8B if on_gpu else TINY), torch.device(options.device)
    dtype = torch.bfloat16 if on_gpu else torch.float16
    layers = [build_layer(shape, case, dtype, device) for _ in range(LAYERS if on_gpu else 1)]
    applied: dict[str, Any] = {"ours": Ours(layers, case, page_tables(shape, case, device))}
    if sources is not None:
        applied |= {name: build(sources, layers, case) for name, build in peers.PEERS.items()}
    for name, apply in applied.items():
        check(name, apply, layers, case)
    for name, way in applied["ours"].ways().items():
        check_way(name, way, layers, case)
    floor = adapter_bytes(shape, case, dtype)
    setup = {
        "rows": case.rows,
        "adapters": case.adapters,
        "ranks": list(case.ranks),
        "sum_of_ranks": case.sum_of_ranks,
        "popularity": case.popularity,
        "segments": case.segments,
        "adapter_bytes": floor,
        "dtype": str(dtype).removeprefix("torch."),
    }
    metrics = (
        measure(layers, applied, 1e6 * floor / bandwidth, options.rounds)
        if on_gpu
        else {"checked": [*applied, *applied["ours"].ways()]}
    )
    return {"setup": setup, "metrics": metrics}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a fifth of the cases")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--peers", choices=["fetch", "none"], default="fetch", help="vLLM's and SGLang's kernels, or not"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.device == "cuda":
        cuda.require()
    torch.manual_seed(0)
    try:
        sources = peers.fetch() if options.peers == "fetch" else None
    except subprocess.CalledProcessError:
        sys.exit("the peers' wheels could not be downloaded; --peers none goes without them")
    if options.device == "cpu":
        for case in INTERPRETED:
            print(json.dumps(run_case(case, options, sources, bandwidth=1.0)))
        return

    bandwidth = cuda.copy_bandwidth()
    about = {
        "versions": {**cuda.versions(), **(peers.versions() if sources else {})},
        "device": {**cuda.description(), "copy_gb_s": round(bandwidth / 1e9, 1)},
    }
    name = about["device"]["name"].lower().replace(" ", "-")
    path = options.results / f"lora-{name}-{date.today()}.jsonl"
    path.parent.mkdir(exist_ok=True)
    results = []
    with path.open("w") as lines:
        for case in cases(options.quick):
            results.append(run_case(case, options, sources, bandwidth))
            print(json.dumps(results[-1] | about), file=lines, flush=True)
            print(f"{case}: {results[-1]['metrics']['ours']}", file=sys.stderr)
    print(f"{about['device']}\n{about['versions']}\n{table(gates(results, bandwidth))}\n{path}")


if __name__ == "__main__":
    main()
