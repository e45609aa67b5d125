"""Chooses block sizes by measurement and writes them, with the figures that chose them, to `lora_kernels/tuned.json`.

    python -m kernels.bench.tune [--rounds 5] [--device cuda|cpu]

Each kernel runs alone in CUDA graphs, for the groups of an 8B model at several batches, over every candidate. What
decides the order of a sum is chosen once for a layer, by the mean over the batches of the best time it allows, in
units of the default's; the rest for each batch. `--device cpu` runs a few candidates in Triton's interpreter, compares
what they compute with what the defaults do, times nothing and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

if {"cpu", "--device=cpu"} & set(sys.argv):  # decided when a kernel is decorated, so before any is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton

from kernels.bench import cuda
from kernels.bench.cases import (
    LLAMA_8B,
    MIXED,
    TINY,
    Case,
    Group,
    active_set,
    build_layer,
    page_tables,
    paged_weights,
)
from lora_kernels import PAGE_ROWS, LoraBatch, WorkList
from lora_kernels.triton_expand import ExpandBlocks
from lora_kernels.triton_path import expand, shrink
from lora_kernels.triton_shrink import ShrinkBlocks, block_k_of, splits_of
from lora_kernels.triton_work_list import build_work_list
from lora_kernels.tuning import TABLE

BATCHES = (1, 16, 64, 256, 2048)
LAYERS = 4
MARGIN = 0.02
"""A candidate must beat the default by so much: less is noise, and one default is easier to reason about."""

SUMS: Mapping[str, Mapping[str, Sequence[int]]] = {
    "shrink": {"block_k": (64, 128, 256), "splits": (1, 2, 4, 8)},
    "expand": {},
}
DEALING: Mapping[str, Mapping[str, Sequence[int]]] = {
    "shrink": {"programs": (264, 528, 1056), "num_warps": (1, 2, 4), "num_stages": (2, 3, 4)},
    "expand": {"block_n": (64, 128, 256), "programs": (264, 528, 1056), "num_warps": (2, 4), "num_stages": (2, 3)},
}

Constants = tuple[tuple[str, int], ...]
"""Names and values, sorted as the tables above have them."""


class Candidate(NamedTuple):
    sums: Constants
    dealing: Constants


def candidates(kernel: str) -> Iterator[Candidate]:
    for sums, dealing in itertools.product(_combinations(SUMS[kernel]), _combinations(DEALING[kernel])):
        yield Candidate(sums, dealing)


def _combinations(values: Mapping[str, Sequence[int]]) -> list[Constants]:
    return [tuple(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def shape_of(kernel: str, group: Group) -> tuple[int, ...]:
    """What the kernel looks its constants up by: groups that share it share them."""
    return (group.width, len(group.outs)) if kernel == "shrink" else group.outs


def default(kernel: str, group: Group, dtype: torch.dtype) -> Candidate:
    """What the kernel launches with where nothing was measured."""
    if kernel == "shrink":
        blocks = asdict(ShrinkBlocks(block_k_of(dtype), splits_of(group.width)))
    else:
        blocks = asdict(ExpandBlocks())
    return Candidate(*(tuple((name, blocks[name]) for name in names[kernel]) for names in (SUMS, DEALING)))


def choose(times: Mapping[int, Mapping[Candidate, float]], usual: Candidate) -> tuple[Constants, dict[int, Constants]]:
    """The sums, and the dealing of each batch.   times: batch rows -> candidate -> microseconds, `usual` among them"""

    def best(rows: int, sums: Constants) -> Candidate:
        return min((each for each in times[rows] if each.sums == sums), key=lambda each: times[rows][each])

    def cost(sums: Constants) -> float:
        return statistics.mean(times[rows][best(rows, sums)] / times[rows][usual] for rows in times)

    found = min({each.sums for of_batch in times.values() for each in of_batch}, key=cost)
    if cost(found) > (1 - MARGIN) * cost(usual.sums):
        found = usual.sums
    dealing = {}
    for rows, of_batch in times.items():
        kept = Candidate(found, usual.dealing)
        beaten = kept not in of_batch or of_batch[best(rows, found)] <= (1 - MARGIN) * of_batch[kept]
        dealing[rows] = best(rows, found).dealing if beaten else usual.dealing
    return found, dealing


class Workload:
    """One group in several layers, one kernel of it, for one batch."""

    def __init__(self, kernel: str, group: Group, case: Case, layers: int, dtype: torch.dtype, device: torch.device):
        shape = {"group": group}
        tables = page_tables(shape, case, device)
        active = active_set(case, tables)
        work = WorkList.allocate(case.rows, case.adapters, max(active.pages_of_slot), device)
        assert work.stage(case.row_slots, active.pages_of_slot)
        build_work_list(work)
        row_slots = torch.tensor(case.row_slots, dtype=torch.int32, device=device)
        self._kernel, self._batch = kernel, LoraBatch(row_slots, active, work)
        self._layers = [build_layer(shape, case, dtype, device) for _ in range(layers)]
        self._weights = [paged_weights(layer, tables)["group"] for layer in self._layers]
        self._usual_splits = splits_of(group.width)

    def _shrunk(self, splits: int) -> torch.Tensor:
        x, work = self._layers[0].x["group"], self._batch.work
        assert work is not None
        columns = work.max_pages * PAGE_ROWS
        return torch.zeros(self._weights[0].slices, splits, x.shape[0], columns, device=x.device)

    def runner(self, candidate: Candidate) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
        """What launches the kernel for every layer, and what it computed for the last."""
        constants = dict(candidate.sums + candidate.dealing)
        if self._kernel == "shrink":
            shrunk, blocks = self._shrunk(constants["splits"]), ShrinkBlocks(**constants)

            def run() -> None:
                for layer, weights in zip(self._layers, self._weights, strict=True):
                    shrink(shrunk, layer.x["group"], weights, self._batch, blocks)

            return run, lambda: shrunk.sum(dim=1)

        shrunk, expand_blocks = self._shrunk(self._usual_splits), ExpandBlocks(**constants)
        shrink(shrunk, self._layers[-1].x["group"], self._weights[-1], self._batch)
        outputs = [layer.y["group"].clone() for layer in self._layers]

        def run_expand() -> None:
            for y, weights in zip(outputs, self._weights, strict=True):
                expand(y, shrunk, weights, self._batch, expand_blocks)

        return run_expand, lambda: outputs[-1]


def workloads(rows: int) -> Iterator[Case]:
    """One adapter, many, and mixed ranks: a batch's time is the sum of theirs."""
    adapters = min(rows, 16)
    yield from (Case(rows, 1, (16,)), Case(rows, adapters, (16,)), Case(rows, adapters, MIXED))


def measure(kernel: str, group: Group, rows: int, rounds: int) -> dict[Candidate, float]:
    """Microseconds of a layer, summed over the workloads. Candidates that do not launch here are left out."""
    dtype, device = torch.bfloat16, torch.device("cuda")
    total: dict[Candidate, float] = {}
    for number, case in enumerate(workloads(rows)):
        workload = Workload(kernel, group, case, LAYERS, dtype, device)
        before, total = total, {}
        tried = before if number else dict.fromkeys([default(kernel, group, dtype), *candidates(kernel)], 0.0)
        for candidate, us in tried.items():
            try:
                graph = cuda.capture(workload.runner(candidate)[0])
            except triton.OutOfResources as error:
                print(f"{kernel} {candidate} does not launch: {error}", file=sys.stderr)
                continue
            total[candidate] = us + statistics.median(cuda.replay_us(graph, 20) for _ in range(rounds)) / LAYERS
    return total


def entry(
    kernel: str, group: Group, times: Mapping[int, Mapping[Candidate, float]], usual: Candidate
) -> dict[str, Any]:
    """The table's entry for one kernel of one group."""
    sums, dealing = choose(times, usual)
    return {
        "kernel": kernel,
        "device": torch.cuda.get_device_name(),
        "dtype": "bfloat16",
        "shape": list(shape_of(kernel, group)),
        "sums": dict(sums),
        "dealing": {str(rows): dict(of_batch) for rows, of_batch in dealing.items()},
        "chosen_by": {
            "versions": cuda.versions(),
            "us": {
                str(rows): {
                    "chosen": round(times[rows][Candidate(sums, dealing[rows])], 3),
                    "default": round(times[rows][usual], 3),
                }
                for rows in times
            },
        },
    }


def check() -> None:
    """Every constant changed once, in the interpreter, computes what the default does."""
    case, group, dtype = Case(5, 3, (8, 33)), TINY["qkv"], torch.float32
    for kernel in SUMS:
        workload = Workload(kernel, group, case, 1, dtype, torch.device("cpu"))
        tried = [default(kernel, group, dtype), *(list(candidates(kernel))[index] for index in (0, -1))]
        results = []
        for candidate in tried:
            run, result = workload.runner(candidate)
            run()
            results.append(result())
            torch.testing.assert_close(results[-1], results[0])
            print(json.dumps({"kernel": kernel, "checked": dict(candidate.sums + candidate.dealing)}))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.device == "cpu":
        check()
        return
    cuda.require()
    kept = [each for each in json.loads(TABLE.read_text()) if each["device"] != torch.cuda.get_device_name()]
    groups = {(kernel, shape_of(kernel, group)): group for kernel in SUMS for group in LLAMA_8B.values()}
    for (kernel, _), group in groups.items():
        times = {rows: measure(kernel, group, rows, options.rounds) for rows in BATCHES}
        kept.append(entry(kernel, group, times, default(kernel, group, torch.bfloat16)))
        print(json.dumps(kept[-1]), flush=True)
    TABLE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
