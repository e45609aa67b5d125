"""`multilora bench`: put load on a running server, sweep over loads, and plot what came out."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from services.bench.load.plan import Backend, Load
from services.bench.load.popularity import Mix, Popularity
from services.cli.output import App, Format, Output
from services.cli.targets import Targets, targets
from services.common.errors import InvalidArgument

if TYPE_CHECKING:
    from services.bench.load.answer import Answer
    from services.bench.load.summary import Wanted
    from services.bench.results import Result

app = App(help="Put load on a running server. Flags have the names of `vllm bench serve`.", no_args_is_help=True)

Value = TypeVar("Value")

Kind = Annotated[Backend, typer.Option("--backend", help="gRPC, or POST /v1/completions of any server.")]
BaseUrl = Annotated[str, typer.Option(help="http://host:port of an openai backend.")]
Model = Annotated[str, typer.Option(help="Base model's name for an openai backend. Default: its first model.")]
Modules = Annotated[str, typer.Option("--lora-modules", help="Adapters to ask for, separated by commas.")]
Ranks = Annotated[str, typer.Option(help="Ranks of the adapters that are made, in turn, separated by commas.")]
NumPrompts = Annotated[int, typer.Option(help="Requests of a run.")]
Warmups = Annotated[int, typer.Option(help="Requests sent before, and not counted.")]
Burstiness = Annotated[float, typer.Option(help="Shape of the Gamma arrivals, 1/cv²; 1 is a Poisson process.")]
InputLen = Annotated[int, typer.Option(help="Tokens of a prompt.")]
OutputLen = Annotated[int, typer.Option(help="Tokens of an answer.")]
RangeRatio = Annotated[float, typer.Option(help="Lengths vary within (1 ± this) times these.")]
VocabSize = Annotated[int, typer.Option(help="Prompts are random token ids below this.")]
IgnoreEos = Annotated[bool, typer.Option(help="Generate to the full length.")]
Seed = Annotated[int, typer.Option(help="Equal seeds ask equal questions at equal times.")]
ZipfS = Annotated[float, typer.Option(help="Exponent of the mix zipf.")]
PowerAlpha = Annotated[float, typer.Option(help="Exponent of the mix power, as S-LoRA's.")]
SkewShare = Annotated[float, typer.Option(help="Share of the first adapter in the mix skewed.")]
PercentileMetrics = Annotated[str, typer.Option(help="Of ttft, tpot, itl and e2el.")]
Percentiles = Annotated[str, typer.Option("--metric-percentiles", help="Beside mean and median.")]
SaveResult = Annotated[bool, typer.Option("--save-result", help="Append JSON lines to a file.")]
ResultDir = Annotated[Path, typer.Option(help="Where that file is.")]
ResultFilename = Annotated[str, typer.Option(help="Its name.")]


@app.command()
def run(
    context: typer.Context,
    backend: Kind = Backend.GRPC,
    base_url: BaseUrl = "http://127.0.0.1:8000",
    model: Model = "",
    adapters: Annotated[int, typer.Option(help="Make and register this many random adapters; 0: the base.")] = 0,
    ranks: Ranks = "16",
    lora_modules: Modules = "",
    num_prompts: NumPrompts = 100,
    num_warmups: Warmups = 0,
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf: as concurrency allows.")] = math.inf,
    burstiness: Burstiness = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Most requests in flight.")] = None,
    random_input_len: InputLen = 64,
    random_output_len: OutputLen = 64,
    random_range_ratio: RangeRatio = 0.0,
    vocab_size: VocabSize = 1000,
    ignore_eos: IgnoreEos = True,
    seed: Seed = 0,
    popularity: Annotated[Mix, typer.Option(help="Which adapters are asked for.")] = Mix.UNIFORM,
    zipf_s: ZipfS = 1.0,
    power_alpha: PowerAlpha = 0.5,
    skew_share: SkewShare = 0.9,
    percentile_metrics: PercentileMetrics = "ttft,tpot,itl,e2el",
    metric_percentiles: Percentiles = "95,99",
    save_result: SaveResult = False,
    result_dir: ResultDir = Path(),
    result_filename: ResultFilename = "bench.jsonl",
    output: Output = Format.TABLE,
) -> None:
    """Send one load, and show time to first token, time per output token, and tokens a second."""
    load = Load(
        num_prompts=num_prompts,
        num_warmups=num_warmups,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        random_input_len=random_input_len,
        random_output_len=random_output_len,
        random_range_ratio=random_range_ratio,
        vocab_size=vocab_size,
        ignore_eos=ignore_eos,
        seed=seed,
        popularity=Popularity(mix=popularity, zipf_s=zipf_s, power_alpha=power_alpha, skew_share=skew_share),
    )
    where = targets(context)
    names = lora_modules.split(",") if lora_modules else _fleet(where, adapters, _numbers("--ranks", ranks, int))
    wanted = _wanted(percentile_metrics, metric_percentiles)
    result = _measure(where, backend, base_url, model, load, names, wanted)
    _report(result, output, result_dir / result_filename if save_result else None)


@app.command()
def sweep(
    context: typer.Context,
    backend: Kind = Backend.GRPC,
    base_url: BaseUrl = "http://127.0.0.1:8000",
    model: Model = "",
    adapters: Annotated[str, typer.Option(help="Numbers of random adapters, by commas; 0: the base.")] = "1,4,16",
    ranks: Ranks = "16",
    request_rates: Annotated[str, typer.Option(help="Requests a second, by commas.")] = "inf",
    max_concurrencies: Annotated[str, typer.Option(help="Most requests in flight, by commas.")] = "8",
    popularities: Annotated[list[Mix], typer.Option("--popularity", help="Repeatable.")] = [Mix.DISTINCT],  # noqa: B006
    num_prompts: NumPrompts = 100,
    num_warmups: Warmups = 0,
    burstiness: Burstiness = 1.0,
    random_input_len: InputLen = 64,
    random_output_len: OutputLen = 64,
    random_range_ratio: RangeRatio = 0.0,
    vocab_size: VocabSize = 1000,
    ignore_eos: IgnoreEos = True,
    seed: Seed = 0,
    zipf_s: ZipfS = 1.0,
    power_alpha: PowerAlpha = 0.5,
    skew_share: SkewShare = 0.9,
    percentile_metrics: PercentileMetrics = "ttft,tpot,itl,e2el",
    metric_percentiles: Percentiles = "95,99",
    result_dir: ResultDir = Path(),
    result_filename: ResultFilename = "bench.jsonl",
    output: Output = Format.TABLE,
) -> None:
    """Run every combination of adapters, rates, concurrencies and mixes, one after the other; keep the results."""
    from services.bench.load import run as runs

    base = Load(
        num_prompts=num_prompts,
        num_warmups=num_warmups,
        burstiness=burstiness,
        random_input_len=random_input_len,
        random_output_len=random_output_len,
        random_range_ratio=random_range_ratio,
        vocab_size=vocab_size,
        ignore_eos=ignore_eos,
        seed=seed,
        popularity=Popularity(zipf_s=zipf_s, power_alpha=power_alpha, skew_share=skew_share),
    )
    counts = _numbers("--adapters", adapters, int)
    points = list(
        runs.sweep(
            base,
            _numbers("--request-rates", request_rates, float),
            _numbers("--max-concurrencies", max_concurrencies, int),
            popularities,
            counts,
        )
    )
    where, wanted = targets(context), _wanted(percentile_metrics, metric_percentiles)
    names = _fleet(where, max(counts), _numbers("--ranks", ranks, int))
    for load, count in points:
        result = _measure(where, backend, base_url, model, load, names[:count], wanted)
        _report(result, output, result_dir / result_filename)


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(help="A file of JSON lines that run or sweep saved.")],
    result_dir: Annotated[Path, typer.Option(help="Where the PNG files go.")] = Path(),
) -> None:
    """Plot tokens a second and time to first token against rate, adapters, and distinct adapters in flight."""
    from services.bench.load.plots import plot_runs, read_results

    written = plot_runs(read_results(results), result_dir)
    if not written:
        typer.echo("nothing to plot: neither rate nor adapters differ among these results", err=True)
    for path in written:
        typer.echo(path)


def _fleet(where: Targets, adapters: int, ranks: Sequence[int]) -> list[str]:
    """Names of registered random adapters. Raises the services' errors."""
    if not adapters:
        return []
    import grpc

    from services.bench.fleet import register_fleet
    from services.cli.clients import store_admin_address
    from services.common.rpc import from_rpc_error

    try:
        return asyncio.run(register_fleet(store_admin_address(where), where.server, adapters, ranks))
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def _measure(
    where: Targets, backend: Backend, base_url: str, model: str, load: Load, adapters: Sequence[str], wanted: Wanted
) -> Result:
    from services.bench.load.run import measure

    address = where.server if backend is Backend.GRPC else base_url
    with _progress(load.num_prompts) as advance:
        return asyncio.run(measure(backend, address, load, adapters, model=model, wanted=wanted, on_end=advance))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Answer], None]]:
    """A bar on stderr, of requests that ended."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("requests", total=total)

        def advance(_answer: Answer) -> None:
            shown.advance(task)

        yield advance


def _report(result: Result, output: Format, path: Path | None) -> None:
    from rich.console import Console

    from services.bench.results import print_table

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{result.to_json()}\n")
    if output is Format.JSON:
        typer.echo(result.to_json())
        return
    setup = result.setup
    title = f"{setup['num_adapters']} adapters, {setup['mix']}, {setup['request_rate']} req/s, "
    print_table([result], Console(), title + f"at most {setup['max_concurrency'] or 'any number'} in flight")


def _wanted(metrics: str, percentiles: str) -> Wanted:
    from services.bench.load.summary import Wanted

    return Wanted(tuple(metrics.split(",")), tuple(_numbers("--metric-percentiles", percentiles, float)))


def _numbers(flag: str, text: str, kind: Callable[[str], Value]) -> list[Value]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgument("INVALID_FIELD", f"{flag} is {text!r}; give numbers by commas", field=flag) from error
