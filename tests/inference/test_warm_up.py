"""`--warm-adapters`: a replica is ready when they are resident, and not before."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from multilora.common.v1 import common_pb2
from services.common.errors import NotFound
from services.inference.config import ConfigError
from tests.assets.random_adapter import make_random_adapter
from tests.clients import generate, request
from tests.conftest import TINY_BASE, StoreProcess, inference_config, run_inference, run_store


@pytest.fixture(scope="module")
def filled_store(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    root = tmp_path_factory.mktemp("warm")
    with run_store(root / "store") as store:
        store.register_base(TINY_BASE, (tiny_model / "config.json").read_text())
        for seed, name in enumerate(("one", "two", "three")):
            made = make_random_adapter(root / name, tiny_model, seed=seed, base_model_name_or_path=TINY_BASE)
            store.register(name, made, TINY_BASE)
        yield store


def test_a_ready_replica_holds_them(filled_store: StoreProcess, tiny_model: Path, tmp_path: Path) -> None:
    settings = {"adapter_store": filled_store.address, "threads": 1, "max_loras": 2}
    config = inference_config(tiny_model, tmp_path, warm_adapters=("one", "default/two:stable"), **settings)
    with run_inference(config) as server:
        assert {each.adapter.name: each.tier for each in server.stats().adapters} == {
            "default/one": "GPU",
            "default/two": "GPU",
        }
        answer = generate(server.address, request([5, 6, 7], adapter="two", max_tokens=2))
        assert answer.started.tier == common_pb2.TIER_GPU


def test_what_cannot_be_warmed_ends_the_start(filled_store: StoreProcess, tiny_model: Path, tmp_path: Path) -> None:
    settings = {"adapter_store": filled_store.address, "threads": 1, "max_loras": 2}
    with (
        pytest.raises(NotFound, match="nobody"),
        run_inference(inference_config(tiny_model, tmp_path, warm_adapters=("nobody",), **settings)),
    ):
        pass
    with pytest.raises(ConfigError, match="names 3, and --max-loras has 2"):
        inference_config(tiny_model, tmp_path, warm_adapters=("one", "two", "three"), **settings)
    with pytest.raises(ConfigError, match="needs --adapter-store"):
        inference_config(tiny_model, tmp_path, warm_adapters=("one",))


def test_a_store_that_comes_late_is_waited_for(filled_store: StoreProcess, tiny_model: Path, tmp_path: Path) -> None:
    grpc_port, store_port = free_port(), free_port()
    settings = {"adapter_store": f"127.0.0.1:{store_port}", "threads": 1, "port": grpc_port}
    config = inference_config(tiny_model, tmp_path / "cache", warm_adapters=("one",), **settings)
    with (
        ThreadPoolExecutor(1) as pool,
        ExitStack() as stack,
        grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel,
    ):
        starting = pool.submit(stack.enter_context, run_inference(config))
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stack.enter_context(run_store(filled_store.data_dir, "--port", str(store_port)))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        (resident,) = starting.result().stats().adapters
        assert (resident.adapter.name, resident.tier) == ("default/one", "GPU")
        watch.cancel()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
