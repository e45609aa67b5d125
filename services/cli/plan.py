"""`multilora plan`: how many adapters a replica should have room for, from what was in use."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.output import Format, Output, print_fields, print_json, warn

if TYPE_CHECKING:
    from services.cli.usage import Plan, Sample


def plan(
    from_metrics: Annotated[str, typer.Option(metavar="URL|FILE", help="Of Prometheus, or a file that --save wrote.")],
    hours: Annotated[float, typer.Option(min=0.01, help="How far back to look.")] = 24.0,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw what was in use beside the plan.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the samples, for another look.")] = None,
    output: Output = Format.TABLE,
) -> None:
    """Say which --max-loras and --max-cpu-loras the busiest replica wants.

    Slots for the most adapters in use at once and 2 more; memory for the most in any five minutes and 20 % more.
    """
    from services.cli.usage import plan as make_plan
    from services.cli.usage import read_samples, write_samples

    samples = read_samples(from_metrics, hours)
    wanted = make_plan(samples)
    if output is Format.JSON:
        print_json(asdict(wanted))
    else:
        print_fields(
            {
                "adapters in five minutes, most": wanted.window,
                "adapters at once, most": wanted.peak,
                "--max-loras": wanted.max_loras,
                "--max-cpu-loras": wanted.max_cpu_loras,
            }
        )
    if wanted.blind:
        warn(
            "some adapters had no metrics of their own, so more are in use: raise --metrics-top-adapters and look again"
        )
    if save is not None:
        write_samples(save, samples)
    if plot is not None:
        _draw(plot, samples, wanted)


def _draw(path: Path, samples: list[Sample], wanted: Plan) -> None:
    """Raises FailedPrecondition without matplotlib."""
    from services.bench.load.plots import plot

    last, lines = samples[-1].at, dict[str, list[tuple[float, float]]]()
    for sample in samples:
        hour = (sample.at - last) / 3600
        lines.setdefault(f"in five minutes, {sample.instance}", []).append((hour, sample.in_window))
        lines.setdefault(f"at once, {sample.instance}", []).append((hour, sample.at_once))
    span = (samples[0].at - last) / 3600, 0.0
    for flag, value in (("--max-loras", wanted.max_loras), ("--max-cpu-loras", wanted.max_cpu_loras)):
        lines[flag] = [(hour, value) for hour in span]
    plot(path, "hours", {"adapters in use": lines})
