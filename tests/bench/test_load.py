"""The load generator against the real server: both protocols count the same tokens, and failures have reasons."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.bench.load.driver import ask, run_load, send
from services.bench.load.plan import Backend, Load, Planned, plan
from services.bench.load.popularity import Mix, Popularity
from services.bench.load.run import measure
from services.bench.load.targets import connect
from services.common.errors import InvalidArgument, Unavailable
from tests.cli.conftest import run_cli
from tests.inference.http.pair import ADAPTER, Pair, run_pair

VOCAB = 300
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with run_pair(tiny_model, tmp_path_factory.mktemp("bench")) as running:
        yield running


def address(pair: Pair, backend: Backend) -> str:
    return pair.server.address if backend is Backend.GRPC else pair.server.http


def test_both_protocols_count_the_same_tokens(pair: Pair) -> None:
    load = Load(
        num_prompts=12,
        max_concurrency=4,
        random_input_len=9,
        random_output_len=7,
        random_range_ratio=0.5,
        vocab_size=VOCAB,
        num_warmups=2,
    )
    requests = plan(load, ["", ADAPTER])

    async def run(backend: Backend) -> list[tuple[str, int, int]]:
        async with connect(backend, address(pair, backend)) as target:
            answers = await run_load(target, load, ["", ADAPTER])
        assert [each.error for each in answers] == [""] * 12
        for each in answers:
            assert each.sent < each.pieces[0] <= each.pieces[-1] <= each.ended
            assert len(each.pieces) <= each.num_output
        return [(each.adapter, each.num_input, each.num_output) for each in answers]

    by_grpc, by_http = (asyncio.run(run(backend)) for backend in Backend)
    assert by_grpc == by_http
    assert by_grpc == [(request.adapter, len(request.prompt), request.max_tokens) for request in requests]


@pytest.mark.parametrize("backend", Backend)
def test_a_failure_is_told_by_its_reason(pair: Pair, backend: Backend) -> None:
    async def run() -> str:
        async with connect(backend, address(pair, backend)) as target:
            return (await ask(target, Planned("default/nobody", [20, 21], 2, 0.0))).error

    assert asyncio.run(run()) == "ADAPTER_NOT_FOUND"


def test_no_more_are_in_flight_than_allowed(pair: Pair) -> None:
    async def run() -> list[tuple[float, float]]:
        async with connect(Backend.GRPC, pair.server.address) as target:
            requests = plan(Load(num_prompts=10, random_output_len=4, vocab_size=VOCAB), [])
            return [(each.sent, each.ended) for each in await send(target, requests, max_concurrency=2)]

    spans = asyncio.run(run())
    assert max(sum(sent <= moment < ended for sent, ended in spans) for moment, _ in spans) == 2


def test_requests_are_not_sent_before_they_are_due(pair: Pair) -> None:
    load = Load(num_prompts=8, request_rate=40.0, random_output_len=1, vocab_size=VOCAB)

    async def run() -> list[float]:
        async with connect(Backend.GRPC, pair.server.address) as target:
            answers = await send(target, plan(load, []))
        return [each.sent for each in answers]

    sent, due = asyncio.run(run()), [request.due for request in plan(load, [])]
    assert sent == sorted(sent)
    assert sent[-1] - sent[0] > due[-1] - due[1]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "https://", "ftp://x"])
def test_an_address_that_is_no_http_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument, match="--base-url"):
        asyncio.run(measure(Backend.OPENAI, url, Load(), []))


def test_a_server_that_is_away(free_port: int) -> None:
    with pytest.raises(Unavailable) as caught:
        asyncio.run(measure(Backend.OPENAI, f"http://127.0.0.1:{free_port}", Load(), []))
    assert caught.value.reason == "NOT_REACHABLE"
    gone = asyncio.run(measure(Backend.GRPC, f"127.0.0.1:{free_port}", Load(num_prompts=2), []))
    assert gone.metrics["errors"] == {"UNAVAILABLE": 2}


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_the_command_registers_runs_sweeps_and_plots(pair: Pair, tmp_path: Path) -> None:
    def cli(*arguments: str) -> str:
        sizes = (
            "--vocab-size",
            str(VOCAB),
            "--num-prompts",
            "6",
            "--random-output-len",
            "3",
            "--random-input-len",
            "4",
        )
        command = ("--server", pair.server.address, "--store-admin", pair.store.address, "bench")
        ended = run_cli(*command, *arguments, *(() if arguments[0] == "plot" else sizes))
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    table = cli("run", "--adapters", "2", "--ranks", "2,4", "--popularity", "zipf", "--max-concurrency", "2")
    assert "TTFT, median" in table
    assert "output throughput" in table
    line = json.loads(cli("run", "--backend", "openai", "--base-url", pair.server.http, "--json", "--adapters", "2"))
    assert line.keys() == {"setup", "versions", "device", "metrics"}
    assert line["setup"]["backend"] == "openai"
    assert (line["metrics"]["completed"], line["metrics"]["failed"]) == (6, 0)
    assert line["metrics"]["total_output_tokens"] == 18
    cli("sweep", "--adapters", "1,2", "--max-concurrencies", "1,2", "--result-dir", str(tmp_path))
    results = [json.loads(each) for each in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [(each["setup"]["max_concurrency"], each["setup"]["num_adapters"]) for each in results] == [
        *((1, 1), (1, 2), (2, 1), (2, 2)),
    ]
    plots = cli("plot", str(tmp_path / "bench.jsonl"), "--result-dir", str(tmp_path)).split()
    assert {Path(path).name for path in plots} == {"adapters.png", "distinct.png"}
    assert all(Path(path).read_bytes().startswith(PNG) for path in plots)


def test_the_mix_is_in_the_setup(pair: Pair) -> None:
    popularity = Popularity(mix=Mix.SKEWED, skew_share=0.5)
    load = Load(num_prompts=2, random_output_len=2, vocab_size=VOCAB, popularity=popularity)
    result = asyncio.run(measure(Backend.GRPC, pair.server.address, load, [ADAPTER]))
    assert result.setup["mix"] == "skewed"
    assert result.setup["request_rate"] == "inf"
    assert json.loads(result.to_json())["metrics"]["adapters_asked"] == 1
