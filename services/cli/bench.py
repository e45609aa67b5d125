"""`multilora bench`: put load on a running server, sweep over loads, and plot what came out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

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
Command = Callable[..., None]

Ranks = Annotated[str, typer.Option(help="Ranks of the adapters that are made, in turn, separated by commas.")]


def _load_of(
    num_prompts: Annotated[int, typer.Option(help="Requests of a run.")] = 100,
    num_warmups: Annotated[int, typer.Option(help="Requests sent before, and not counted.")] = 0,
    burstiness: Annotated[float, typer.Option(help="Shape of the Gamma arrivals, 1/cv²; 1: Poisson's.")] = 1.0,
    random_input_len: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 64,
    random_output_len: Annotated[int, typer.Option(help="Tokens of an answer.")] = 64,
    random_range_ratio: Annotated[float, typer.Option(help="Lengths vary within (1 ± this) times these.")] = 0.0,
    vocab_size: Annotated[int, typer.Option(help="Prompts are random token ids below this.")] = 1000,
    ignore_eos: Annotated[bool, typer.Option(help="Generate to the full length.")] = True,
    seed: Annotated[int, typer.Option(help="Equal seeds ask equal questions at equal times.")] = 0,
    zipf_s: Annotated[float, typer.Option(help="Exponent of the mix zipf.")] = 1.0,
    power_alpha: Annotated[float, typer.Option(help="Exponent of the mix power, as S-LoRA's.")] = 0.5,
    skew_share: Annotated[float, typer.Option(help="Share of the first adapter in the mix skewed.")] = 0.9,
) -> Load:
    """What is asked; at which rate, how many at once and of which adapters is each command's own."""
    return Load(
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


@dataclass(frozen=True)
class Asked:
    """The server that is asked, as an openai backend where it is one, and what is told of its answers."""

    backend: Annotated[Backend, typer.Option(help="gRPC, or POST /v1/completions of any server.")] = Backend.GRPC
    base_url: Annotated[str, typer.Option(help="http(s)://host:port of an openai backend.")] = "http://127.0.0.1:8000"
    model: Annotated[str, typer.Option(help="Base model's name for an openai backend. Default: its first model.")] = ""
    percentile_metrics: Annotated[str, typer.Option(help="Of ttft, tpot, itl and e2el.")] = "ttft,tpot,itl,e2el"
    metric_percentiles: Annotated[str, typer.Option(help="Beside mean and median.")] = "95,99"
    result_dir: Annotated[Path, typer.Option(help="Where the file of results is.")] = Path()
    result_filename: Annotated[str, typer.Option(help="Its name; JSON lines are appended.")] = "bench.jsonl"
    output: Output = Format.TABLE

    @property
    def results(self) -> Path:
        return self.result_dir / self.result_filename

    def wanted(self) -> Wanted:
        """Raises InvalidArgument."""
        from services.bench.load.summary import Wanted

        percentiles = _numbers("--metric-percentiles", self.metric_percentiles, float)
        return Wanted(tuple(self.percentile_metrics.split(",")), tuple(percentiles))


def _with_flags(**groups: Callable[..., object]) -> Callable[[Command], Command]:
    """Gives a command the flags of each group besides its own; what a group makes of them comes under its name."""

    def extended(command: Command) -> Command:
        names = {name: list(inspect.signature(group).parameters) for name, group in groups.items()}
        parameters = [each for each in _flags(command) if each.name not in groups]
        parameters += [each for group in groups.values() for each in _flags(group)]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = {name: group(**{flag: values.pop(flag) for flag in names[name]}) for name, group in groups.items()}
            command(**values, **made)

        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return extended


def _flags(function: Callable[..., object]) -> list[inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return [each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]


@app.command()
@_with_flags(load=_load_of, asked=Asked)
def run(
    context: typer.Context,
    load: Load,
    asked: Asked,
    adapters: Annotated[int, typer.Option(help="Make and register this many random adapters; 0: the base.")] = 0,
    ranks: Ranks = "16",
    lora_modules: Annotated[str, typer.Option(help="Adapters to ask for, separated by commas.")] = "",
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf: as concurrency allows.")] = math.inf,
    max_concurrency: Annotated[int | None, typer.Option(help="Most requests in flight.")] = None,
    popularity: Annotated[Mix, typer.Option(help="Which adapters are asked for.")] = Mix.UNIFORM,
    save_result: Annotated[bool, typer.Option("--save-result", help="Append the result to a file.")] = False,
) -> None:
    """Send one load, and show time to first token, time per output token, and tokens a second."""
    mix = replace(load.popularity, mix=popularity)
    load = replace(load, request_rate=request_rate, max_concurrency=max_concurrency, popularity=mix)
    where = targets(context)
    names = lora_modules.split(",") if lora_modules else _fleet(where, adapters, _numbers("--ranks", ranks, int))
    result = _measure(where, asked, load, names)
    _report(result, asked.output, asked.results if save_result else None)


@app.command()
@_with_flags(load=_load_of, asked=Asked)
def sweep(
    context: typer.Context,
    load: Load,
    asked: Asked,
    adapters: Annotated[str, typer.Option(help="Numbers of random adapters, by commas; 0: the base.")] = "1,4,16",
    ranks: Ranks = "16",
    request_rates: Annotated[str, typer.Option(help="Requests a second, by commas.")] = "inf",
    max_concurrencies: Annotated[str, typer.Option(help="Most requests in flight, by commas.")] = "8",
    popularities: Annotated[list[Mix], typer.Option("--popularity", help="Repeatable.")] = [Mix.DISTINCT],  # noqa: B006
) -> None:
    """Run every combination of adapters, rates, concurrencies and mixes, one after the other; keep the results."""
    from services.bench.load import run as runs

    counts = _numbers("--adapters", adapters, int)
    rates = _numbers("--request-rates", request_rates, float)
    concurrencies = _numbers("--max-concurrencies", max_concurrencies, int)
    points = list(runs.sweep(load, rates, concurrencies, popularities, counts))
    where = targets(context)
    names = _fleet(where, max(counts), _numbers("--ranks", ranks, int))
    for point, count in points:
        _report(_measure(where, asked, point, names[:count]), asked.output, asked.results)


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
    from services.cli.clients import credentials_of, store_admin_address
    from services.common.rpc import from_rpc_error

    store, credentials = store_admin_address(where), credentials_of(where)
    try:
        return asyncio.run(register_fleet(store, where.server, adapters, ranks, credentials=credentials))
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def _measure(where: Targets, asked: Asked, load: Load, adapters: Sequence[str]) -> Result:
    from services.bench.load.run import measure
    from services.cli.clients import credentials_of

    address = where.server if asked.backend is Backend.GRPC else asked.base_url
    with _progress(load.num_prompts) as advance:
        return asyncio.run(
            measure(
                asked.backend,
                address,
                load,
                adapters,
                model=asked.model,
                credentials=credentials_of(where),
                wanted=asked.wanted(),
                on_end=advance,
            )
        )


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


def _numbers(flag: str, text: str, kind: Callable[[str], Value]) -> list[Value]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgument("INVALID_FIELD", f"{flag} is {text!r}; give numbers by commas", field=flag) from error
