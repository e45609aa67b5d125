"""`multilora plan`: room for how many adapters a replica wants, from what was in use, and what its memory goes to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from services.cli.output import Format, Output, print_fields, print_json, warn
from services.common.profile import MAX_LORA_RANK

if TYPE_CHECKING:
    from services.cli.usage import Plan, Sample


PROMETHEUS_HOURS = 24.0

Dtype = Literal["float32", "float16", "bfloat16"]


def plan(
    context: typer.Context,
    from_metrics: Annotated[
        str,
        typer.Option(metavar="URL|FILE", help="Of Prometheus, of a replica's /metrics, or a file that --save wrote."),
    ] = "",
    hours: Annotated[
        float | None,
        typer.Option(min=0.001, help="How far back to look: 24; a replica's page is read so long: 5 minutes."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw what was in use beside the plan.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the samples, for another look.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(exists=True, help="config.json, a model directory or a .gguf file."),
    ] = None,
    device_gib: Annotated[
        float | None,
        typer.Option("--device-memory", metavar="GIB", min=0.01, help="Of the GPU. Default: a CPU's plan."),
    ] = None,
    ranks: Annotated[list[int] | None, typer.Option("--rank", min=1, help="Of adapters to size; repeatable.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the service, as are those that follow.")] = "bfloat16",
    quantization: Annotated[Literal["none", "int8"], typer.Option(help="Of the base weights, on a CPU.")] = "none",
    max_loras: Annotated[int, typer.Option(min=1)] = 8,
    max_lora_rank: Annotated[int, typer.Option(min=1, max=MAX_LORA_RANK)] = 64,
    max_model_len: Annotated[int, typer.Option(min=0, help="0: the model's own.")] = 0,
    max_num_seqs: Annotated[int, typer.Option(min=1)] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1)] = 512,
    block_size: Annotated[int, typer.Option(min=1)] = 16,
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.01, max=1.0)] = 0.9,
    kv_cache_memory_bytes: Annotated[int, typer.Option(min=1, help="On a CPU.")] = 1 << 30,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="The plan is one GPU's.")] = 1,
    fully_sharded_loras: Annotated[bool, typer.Option("--fully-sharded-loras")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Say what a replica needs: give one of --from-metrics and --config.

    --from-metrics: which --max-loras and --max-cpu-loras the busiest replica wants. Slots for the most adapters in use
    at once and 2 more; memory for the most in any five minutes and 20 % more. A URL that ends in /metrics is a
    replica's own page, read every 5 seconds from now on; it is shown your token.

    --config: what its memory goes to, by the table it logs as it starts, and the bytes of an adapter on every linear.
    """
    if bool(from_metrics) == (config is not None):
        raise typer.BadParameter("give one of --from-metrics and --config")
    if config is None:
        _plan_adapters(context, from_metrics, hours, plot, save, output)
        return
    if quantization != "none" and (device_gib is not None or tensor_parallel_size > 1):
        raise typer.BadParameter("--quantization is one CPU's: leave out --device-memory and --tensor-parallel-size")
    from services.cli.memory import print_memory_plan
    from services.common.memory_plan import Room

    room = Room(
        dtype=dtype,
        quantization=quantization,
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        tensor_parallel_size=tensor_parallel_size,
        fully_sharded_loras=fully_sharded_loras,
    )
    gpu = None if device_gib is None else (device_gib, gpu_memory_utilization)
    print_memory_plan(config, room, gpu, kv_cache_memory_bytes, ranks or [8, 16, 32, 64], output)


def _plan_adapters(
    context: typer.Context,
    from_metrics: str,
    hours: float | None,
    plot: Path | None,
    save: Path | None,
    output: Format,
) -> None:
    from services.cli.usage import plan as make_plan
    from services.cli.usage import write_samples

    samples = _samples(context, from_metrics, hours)
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


def _samples(context: typer.Context, place: str, hours: float | None) -> list[Sample]:
    """Raises NotFound when no adapter was in use."""
    from services.cli.clients import credentials_of
    from services.cli.page import is_page, watch
    from services.cli.targets import targets
    from services.cli.usage import WINDOW_SECONDS, in_use, read_samples

    if not is_page(place):
        return in_use(place, read_samples(place, PROMETHEUS_HOURS if hours is None else hours))
    seconds = WINDOW_SECONDS if hours is None else hours * 3600
    typer.echo(f"reading {place} for {seconds:g} seconds", err=True)
    return in_use(place, watch(place, seconds, credentials_of(targets(context))))


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
