"""PNG plots of result lines; matplotlib comes with `pip install 'multilora[bench]'`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from services.bench.load.run import BENCHMARK
from services.common.errors import FailedPrecondition, InvalidArgument

Point = tuple[float, float]
Lines = Mapping[str, Sequence[Point]]

_AGAINST = {
    "rate": ("requests a second", "setup", "request_rate"),
    "adapters": ("adapters", "setup", "num_adapters"),
    "distinct": ("distinct adapters in flight, mean", "metrics", "adapters_in_flight"),
}
_SHOWN = {"output_throughput": "output tokens/s", "median_ttft_ms": "TTFT, median (ms)"}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The load runs of a file of JSON lines. Raises InvalidArgument when there is none."""
    try:
        results = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InvalidArgument("INVALID_RESULTS", f"{path} is no readable file of JSON lines: {error}") from error
    runs = [result for result in results if result["setup"]["benchmark"] == BENCHMARK]
    if not runs:
        raise InvalidArgument("NO_RESULTS", f"{path} has no result of `multilora bench run` or `sweep`")
    return runs


def plot_runs(results: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Tokens/s and TTFT against rate, adapters, and distinct adapters per batch; a file for each that varies."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (label, part, key) in _AGAINST.items():
        panels = {shown: _lines(results, part, key, metric) for metric, shown in _SHOWN.items()}
        if len({x for lines in panels.values() for points in lines.values() for x, _ in points}) > 1:
            written.append(plot(directory / f"{name}.png", label, panels))
    return written


def plot(path: Path, label: str, panels: Mapping[str, Lines]) -> Path:
    """Panels side by side over one kind of x axis, a line a name. Raises FailedPrecondition without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FailedPrecondition(
            "MATPLOTLIB_MISSING", "plots need matplotlib; pip install 'multilora[bench]'"
        ) from error
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in lines.items():
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, marker="o", label=name)
        axes.set(xlabel=label, ylabel=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def _lines(results: Iterable[Mapping[str, Any]], part: str, key: str, metric: str) -> dict[str, list[Point]]:
    lines: dict[str, list[Point]] = defaultdict(list)
    for result in results:
        x, y = result[part][key], result["metrics"].get(metric)
        if y is not None and x != "inf":
            lines[_name(result["setup"], without=key)].append((float(x), float(y)))
    return dict(lines)


def _name(setup: Mapping[str, Any], without: str) -> str:
    """What tells a line from the others: everything that a sweep varies but the x axis."""
    parts = {
        "mix": str(setup["mix"]),
        "num_adapters": f"{setup['num_adapters']} adapters",
        "request_rate": f"{setup['request_rate']}/s",
        "max_concurrency": f"{setup['max_concurrency']} at once",
    }
    hidden = {without} | ({"num_adapters"} if without == "adapters_in_flight" else set())
    hidden |= {"request_rate"} if setup["request_rate"] == "inf" else set()
    hidden |= {"max_concurrency"} if setup["max_concurrency"] is None else set()
    return ", ".join(text for key, text in parts.items() if key not in hidden)
