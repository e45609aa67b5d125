"""Decoding goes on while an adapter is on its way, and what is here serves on while the store is away."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from multilora.common.v1 import common_pb2
from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from services.common.errors import DataLoss, DeadlineExceeded, NotFound, Unavailable
from services.inference.adapters import store_client
from services.inference.engine.messages import ResidentAdapter
from tests.assets.random_adapter import make_random_adapter
from tests.clients import Answer, collect, failure, generate, request
from tests.conftest import TINY_BASE, InferenceServer, StoreProcess, inference_config, run_inference, run_store
from tests.inference.http.pair import eventually
from tests.inference.store_proxy import StoreProxy, run_proxy

ADAPTERS = ["one", "two", "three", "four"]
GPU, CPU, DISK, STORE = common_pb2.TIER_GPU, common_pb2.TIER_CPU, common_pb2.TIER_DISK, common_pb2.TIER_STORE


def register_all(store: StoreProcess, model: Path, root: Path) -> None:
    store.register_base(TINY_BASE, (model / "config.json").read_text())
    for seed, name in enumerate(ADAPTERS):
        made = make_random_adapter(root / name, model, seed=seed, base_model_name_or_path=TINY_BASE)
        store.register(name, made, TINY_BASE)


@pytest.fixture(scope="module")
def filled_store(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    root = tmp_path_factory.mktemp("pull")
    with run_store(root / "store") as process:
        register_all(process, tiny_model, root)
        yield process


@pytest.fixture
def proxy(filled_store: StoreProcess) -> Iterator[StoreProxy]:
    with run_proxy(filled_store) as running:
        yield running


@contextlib.contextmanager
def serving(model: Path, address: str, data_dir: Path, **room: Any) -> Iterator[InferenceServer]:
    config = inference_config(model, data_dir, http_port=None, adapter_store=address, threads=1, **room)
    with run_inference(config) as server:
        yield server


@pytest.fixture
def server(tiny_model: Path, proxy: StoreProxy, tmp_path: Path) -> Iterator[InferenceServer]:
    with serving(tiny_model, proxy.address, tmp_path / "replica") as running:
        yield running


def asked(adapter: str, max_tokens: int = 8, **fields: Any) -> inference_pb2.GenerateRequest:
    return request("The harbour was quiet", adapter=adapter, max_tokens=max_tokens, **fields)


@contextlib.contextmanager
def in_background(server: InferenceServer, *messages: inference_pb2.GenerateRequest) -> Iterator[list[Future[Answer]]]:
    with ThreadPoolExecutor(len(messages)) as pool:
        yield [pool.submit(generate, server.address, message) for message in messages]


def tier(server: InferenceServer, adapter: str) -> common_pb2.Tier.ValueType:
    return generate(server.address, asked(adapter)).started.tier


def resident(server: InferenceServer, adapter: str) -> ResidentAdapter:
    (found,) = [known for known in server.stats().adapters if known.adapter.name == f"default/{adapter}"]
    return found


def test_others_decode_while_an_adapter_is_pulled(server: InferenceServer, proxy: StoreProxy) -> None:
    generate(server.address, asked("one"))
    with in_background(server, asked("two")) as [waiting], proxy.holding() as begun:
        begun()
        before = len(server.steps)
        for adapter in ("", "one", ""):
            assert len(generate(server.address, asked(adapter, max_tokens=20)).token_ids) == 20
        assert len(server.steps) - before == 60, "one step a token, as if nothing were pulled"
        assert not waiting.done()
        assert (server.stats().running, server.stats().waiting) == (0, 1)
        assert (resident(server, "two").tier, resident(server, "two").waiting) == ("STORE", 1)
        proxy.gate.set()
        answer = waiting.result(timeout=60)
    assert len(answer.token_ids) == 8
    assert answer.started.tier == STORE
    assert 0 < answer.finished.timings.adapter_load <= answer.finished.timings.queue
    again = generate(server.address, asked("two"))
    assert (again.started.tier, again.token_ids) == (GPU, answer.token_ids)
    assert again.finished.timings.adapter_load == 0


def test_one_slow_pull_holds_no_other_pull_up(server: InferenceServer, proxy: StoreProxy) -> None:
    with in_background(server, asked("one")) as [waiting], proxy.holding() as begun:
        begun()
        with proxy.letting_others_pass():
            assert generate(server.address, asked("two")).started.tier == STORE
            assert not waiting.done()
        assert len(waiting.result(timeout=60).token_ids) == 8


def test_many_requests_for_one_adapter_are_one_pull(server: InferenceServer, proxy: StoreProxy) -> None:
    with in_background(server, *[asked("one")] * 6) as waiting, proxy.holding() as begun:
        begun()
        eventually(lambda: server.stats().waiting == 6)
        proxy.gate.set()
        answers = [future.result(timeout=60) for future in waiting]
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    assert sum(proxy.pulls.values()) == 1


def test_a_request_given_up_during_the_pull(server: InferenceServer, proxy: StoreProxy) -> None:
    with grpc.insecure_channel(server.address) as channel, proxy.holding() as begun:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(asked("one"))
        begun()
        call.cancel()
        eventually(lambda: server.stats().waiting == 0)
        with pytest.raises(DeadlineExceeded):
            generate(server.address, asked("one"), timeout=0.2)
        eventually(lambda: server.stats().waiting == 0)
    eventually(lambda: resident(server, "one").tier == "CPU")
    assert tier(server, "one") == CPU, "the pull was not in vain"
    assert sum(proxy.pulls.values()) == 1


def test_every_tier(tiny_model: Path, proxy: StoreProxy, tmp_path: Path) -> None:
    with serving(tiny_model, proxy.address, tmp_path, max_loras=1, max_cpu_loras=2) as server:
        assert [tier(server, "one"), tier(server, "one")] == [STORE, GPU]
        assert tier(server, "two") == STORE
        assert tier(server, "one") == CPU, "its slot went to two, its copy stayed"
        assert tier(server, "three") == STORE
        assert tier(server, "two") == DISK, "its copy went to make room for three's"
    with serving(tiny_model, proxy.address, tmp_path) as server:
        assert [tier(server, name) for name in ADAPTERS] == [DISK, DISK, DISK, STORE]
        assert [tier(server, name) for name in ADAPTERS] == [GPU] * 4
    assert max(proxy.pulls.values()) == 1


def break_off(_: bytes) -> bytes:
    raise ConnectionError


@pytest.mark.parametrize(
    "spoil",
    [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data + b"\0"],
    ids=["flipped", "long"],
)
def test_a_spoilt_pull_fails_its_adapter_alone(
    server: InferenceServer, proxy: StoreProxy, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    generate(server.address, asked("one"))
    proxy.spoil = [spoil]
    with caplog.at_level(logging.CRITICAL):
        errors = [failure(server.address, asked("two")) for _ in range(3)]
    assert all(isinstance(error, DataLoss) and error.retry_after for error in errors)
    assert (resident(server, "two").state, proxy.spoil) == ("FAILED", []), "asked once, and then left alone"
    assert resident(server, "two").error
    assert sum(proxy.pulls.values()) == 2
    for adapter in ("one", "", "three"):
        assert len(generate(server.address, asked(adapter)).token_ids) == 8


@pytest.mark.parametrize(
    ("spoil", "offset"),
    [(lambda data: data[:-1], -1), (lambda _: b"", 4096), (break_off, 4096)],
    ids=["short", "cut", "broken"],
)
def test_a_broken_pull_goes_on_where_it_broke(
    server: InferenceServer, proxy: StoreProxy, spoil: Any, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.spoil = [spoil]
    with caplog.at_level(logging.CRITICAL):
        answer = generate(server.address, asked("two"))
    assert (answer.started.tier, len(answer.token_ids)) == (STORE, 8)
    size = resident(server, "two").adapter.pack_size
    assert proxy.offsets == [0, offset % size]
    assert not resident(server, "two").error


def test_a_store_that_dies_during_a_pull(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What waits for the adapter fails with the store's absence and a time; what is here serves on."""
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(run_store(tmp_path / "store"))
        register_all(store, tiny_model, tmp_path)
        between = stack.enter_context(run_proxy(store))
        server = stack.enter_context(serving(tiny_model, between.address, tmp_path / "replica"))
        generate(server.address, asked("one"))
        caplog.set_level(logging.CRITICAL)
        between.spoil = [break_off]
        with ThreadPoolExecutor(1) as pool, between.holding() as begun:
            waiting = pool.submit(failure, server.address, asked("two"))
            begun()
            store.process.kill()
            store.process.wait()
            between.gate.set()
            error = waiting.result(timeout=60)
        assert isinstance(error, Unavailable) and error.retry_after
        assert resident(server, "two").state == "FAILED"
        assert generate(server.address, asked("one")).started.tier == GPU


def test_a_file_damaged_on_disk_is_pulled_again(
    tiny_model: Path, proxy: StoreProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tiny_model, proxy.address, tmp_path) as server:
        expected = generate(server.address, asked("one")).token_ids
    (file,) = (tmp_path / "adapters").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    caplog.set_level(logging.CRITICAL)
    with serving(tiny_model, proxy.address, tmp_path) as server:
        answer = generate(server.address, asked("one"))
        assert (answer.started.tier, answer.token_ids) == (DISK, expected)
        taken = server.stats().adapter_transitions
        assert [taken[ends] for ends in (("DISK", "STORE"), ("STORE", "PULLING"), ("PULLING", "DISK"))] == [1, 1, 1]
    assert max(proxy.pulls.values()) == 2


def test_the_store_away_and_back(tiny_model: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(run_store(tmp_path / "store"))
        register_all(store, tiny_model, tmp_path)
        replica = serving(tiny_model, store.address, tmp_path / "replica", max_loras=1, max_cpu_loras=1)
        server = stack.enter_context(replica)
        answers = {name: generate(server.address, asked(name)).token_ids for name in ("one", "two")}
        named_only = asked("three", sampling={"temperature": -1})  # resolved, then refused: never pulled
        failure(server.address, named_only)
        assert isinstance(failure(server.address, asked("nobody")), NotFound)

        store.process.kill()
        store.process.wait()
        resolver = server.serving.resolver
        resolver._clock = lambda: time.monotonic() + 1000  # nothing remembered is fresh any more
        assert generate(server.address, asked("two")).started.tier == GPU
        for name, expected in answers.items():
            assert generate(server.address, asked(name)).token_ids == expected
        assert len(generate(server.address, asked("")).token_ids) == 8
        for name in ("three", "four", "nobody"):
            error = failure(server.address, asked(name))
            assert isinstance(error, Unavailable), f"{name}: {error!r}"
            assert error.retry_after

        port = store.address.rsplit(":", 1)[1]
        stack.enter_context(run_store(tmp_path / "store", "--port", port))

        def is_back(name: str) -> bool:
            try:
                return len(generate(server.address, asked(name)).token_ids) == 8
            except Unavailable:  # for as long as it was told to stay away
                return False

        assert len(generate(server.address, asked("four")).token_ids) == 8
        eventually(lambda: is_back("three"))


def test_a_store_that_starts_after_its_replica(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is asked for first is resolved, though the channel sleeps: here for an hour, lest it wake in time."""
    an_hour = [(f"grpc.{which}_reconnect_backoff_ms", 3_600_000) for which in ("initial", "max")]
    monkeypatch.setattr(store_client, "_OPTIONS", an_hour)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(tiny_model, f"127.0.0.1:{port}", tmp_path / "replica") as server:
        away = failure(server.address, asked("one"))
        assert away.reason == "STORE_UNAVAILABLE"
        assert "refused" in away.message
        with run_store(tmp_path / "store", "--port", str(port)) as store:
            register_all(store, tiny_model, tmp_path)
            for name in ADAPTERS:
                assert generate(server.address, asked(name)).started.tier == STORE


def test_a_request_id_can_be_used_again_at_once(server: InferenceServer) -> None:
    """The engine's last words about the first request must not end, or speak in, the second."""
    whole = generate(server.address, asked("", max_tokens=200))
    other = generate(server.address, asked("one", max_tokens=5)).token_ids
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for _ in range(15):
            stop = asked("", max_tokens=200, request_id="same", stopping={"stop": [whole.text[4:6]]})
            assert collect(stub.Generate(stop))[-1].finished.reason == inference_pb2.FINISH_REASON_STOP
            second = collect(stub.Generate(asked("one", max_tokens=5, request_id="same")))
            assert [token for event in second for token in event.chunk.token_ids] == other
    eventually(lambda: server.stats().running == 0)
