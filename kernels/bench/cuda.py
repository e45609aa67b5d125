"""The GPU under test: what it is, how fast it copies, and how long captured work takes on it."""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

COPY_BYTES = 1 << 30
SAMPLE_US = 5000.0
"""A graph is replayed until about so much time has passed: a hundred times the resolution of an event."""


def require() -> None:
    """Exit, saying so, where there is no CUDA GPU."""
    if not torch.cuda.is_available():
        sys.exit(
            f"no CUDA GPU: torch {torch.__version__} finds none on this machine, so nothing ran and nothing is shown"
        )


def description() -> dict[str, Any]:
    """The device, as it stands in a line of results."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / (1 << 30), 1),
        "l2_mib": round(properties.L2_cache_size / (1 << 20), 1),
    }


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `run`, which ran before on a stream of its own: kernels are compiled, addresses known."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Microseconds of one replay, over so many back to back."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end)) / times


def interleaved_us(graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Each graph once a round, A B C A B C: what disturbs one disturbs them all."""
    times = {name: max(1, round(SAMPLE_US / replay_us(graph, 3))) for name, graph in graphs.items()}
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            taken[name].append(replay_us(graph, times[name]))
    return taken


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes, the limit that bandwidth is compared with."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    graph = capture(lambda: target.copy_(source))
    return 2 * COPY_BYTES / (1e-6 * statistics.median(replay_us(graph, 5) for _ in range(10)))


if __name__ == "__main__":
    require()
    print(description(), versions())
