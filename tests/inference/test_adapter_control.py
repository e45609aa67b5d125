"""An operator's levers against a real store and a real replica, while requests run."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from multilora.adapter_store.v1 import admin_pb2
from multilora.common.v1 import common_pb2
from multilora.inference.v1 import control_pb2, control_pb2_grpc
from services.common.errors import (
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    MultiloraError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from services.common.rpc import from_rpc_error
from services.inference.engine.messages import ResidentAdapter
from tests.assets.random_adapter import make_random_adapter
from tests.clients import Answer, failure, generate, request
from tests.conftest import TINY_BASE, InferenceServer, StoreProcess, inference_config, run_inference, run_store
from tests.inference.http.pair import eventually

ADAPTERS = ["one", "two", "three"]
LONG = 400
GPU, CPU = common_pb2.TIER_GPU, common_pb2.TIER_CPU


@dataclass
class Replica:
    """A replica of two slots, its store, and a directory beneath which it takes paths."""

    server: InferenceServer
    store: StoreProcess
    root: Path

    def call(self, method: str, adapter: str, **fields: Any) -> Any:
        """A call of the control service. Raises the server's error."""
        with grpc.insecure_channel(self.server.address) as channel:
            stub = control_pb2_grpc.AdapterControlServiceStub(channel)
            message = getattr(control_pb2, f"{method}Request")(adapter=adapter, **fields)
            try:
                return getattr(stub, method)(message, timeout=60)
            except grpc.RpcError as error:
                raise from_rpc_error(error) from None

    def refused(self, method: str, adapter: str, **fields: Any) -> MultiloraError:
        with pytest.raises(MultiloraError) as caught:
            self.call(method, adapter, **fields)
        return caught.value

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.server.http}{path}", json=body, timeout=60)

    def ask(self, adapter: str, max_tokens: int = 4) -> Answer:
        return generate(self.server.address, request("The harbour", adapter=adapter, max_tokens=max_tokens))

    def resident(self, adapter: str) -> ResidentAdapter:
        (found,) = [each for each in self.server.stats().adapters if each.adapter.name == f"default/{adapter}"]
        return found

    @contextlib.contextmanager
    def running(self, adapter: str) -> Iterator[Future[Answer]]:
        """A long answer under way."""
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self.ask, adapter, LONG)
            eventually(lambda: self.server.stats().running == 1)
            yield answer


@pytest.fixture(scope="module")
def filled_store(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StoreProcess, Path]]:
    root = tmp_path_factory.mktemp("control")
    with run_store(root / "store") as store:
        store.register_base(TINY_BASE, (tiny_model / "config.json").read_text())
        for seed, name in enumerate(ADAPTERS):
            made = make_random_adapter(root / "made" / name, tiny_model, seed=seed, base_model_name_or_path=TINY_BASE)
            store.register(name, made, TINY_BASE)
        yield store, root / "made"


@pytest.fixture
def replica(tiny_model: Path, filled_store: tuple[StoreProcess, Path], tmp_path: Path) -> Iterator[Replica]:
    store, root = filled_store
    config = inference_config(
        tiny_model,
        tmp_path,
        adapter_store=store.address,
        adapter_root=root,
        threads=1,
        max_loras=2,
        max_cpu_loras=3,
    )
    with run_inference(config) as server:
        yield Replica(server, store, root)


def test_a_loaded_adapter_is_here_before_anyone_asks(replica: Replica) -> None:
    loaded = replica.call("LoadAdapter", "one")
    assert (loaded.identity.adapter, loaded.identity.version, loaded.tier) == ("default/one", 1, GPU)
    assert replica.ask("one").started.tier == GPU
    assert replica.call("LoadAdapter", "two").tier == GPU
    assert replica.call("LoadAdapter", "three").tier == CPU, "no slot is free, and none is taken"
    assert replica.resident("three").requests == 0
    assert isinstance(replica.refused("LoadAdapter", "nobody"), NotFound)
    assert isinstance(replica.refused("LoadAdapter", "No such name"), InvalidArgument)


def test_every_version_that_an_alias_splits_between_is_loaded_and_named(replica: Replica) -> None:
    for directory in ("one", "two"):
        replica.store.register("split", replica.root / directory, TINY_BASE)
    targets = [admin_pb2.WeightedVersion(version=number, weight=1) for number in (1, 2)]
    replica.store.admin().SetAlias(admin_pb2.SetAliasRequest(adapter="split", alias="stable", targets=targets))
    for method in ("LoadAdapter", "PinAdapter"):
        answer = replica.call(method, "split")
        assert sorted(each.identity.version for each in answer.adapters) == [1, 2]
        assert answer.identity == answer.adapters[0].identity
    assert all(each.pinned for each in replica.server.stats().adapters if each.adapter.name == "default/split")


def test_an_unload_hides_the_name_until_it_is_loaded_again(replica: Replica) -> None:
    expected = replica.ask("one").token_ids
    assert replica.call("UnloadAdapter", "one").cancelled_requests == 0
    assert (replica.resident("one").tier, replica.resident("one").state) == ("DISK", "DISK")
    for reference in ("one", "one@1", "one:latest"):
        error = failure(replica.server.address, request("x", adapter=reference))
        assert isinstance(error, NotFound) and error.reason == "ADAPTER_NOT_FOUND"
        assert isinstance(replica.refused("UnloadAdapter", reference), NotFound), "unloaded already"
    assert replica.store.admin().GetAdapter(admin_pb2.GetAdapterRequest(adapter="one")).adapter.num_versions == 1
    assert len(replica.ask("two").token_ids) == 4
    replica.call("LoadAdapter", "one")
    assert replica.ask("one").token_ids == expected


def test_an_unload_lets_running_requests_finish(replica: Replica) -> None:
    with replica.running("one") as answer, ThreadPoolExecutor(2) as pool:
        unloads = [pool.submit(replica.call, "UnloadAdapter", "one") for _ in range(2)]
        eventually(lambda: replica.resident("one").state == "DRAINING")
        assert isinstance(failure(replica.server.address, request("x", adapter="one")), NotFound)
        assert len(answer.result(timeout=60).token_ids) == LONG
        assert [unload.result(timeout=60).cancelled_requests for unload in unloads] == [0, 0]
    assert replica.resident("one").state == "DISK"


def test_an_unload_cancels_what_runs_past_its_deadline(replica: Replica) -> None:
    with replica.running("one") as answer:
        with replica.server.held(), ThreadPoolExecutor(1) as pool:
            unload = pool.submit(replica.call, "UnloadAdapter", "one", drain_timeout=1e-6)
            replica.server.go_on.set()
            assert unload.result(timeout=60).cancelled_requests == 1
        assert len(answer.result(timeout=60).token_ids) < LONG
    assert replica.resident("one").state == "DISK"
    assert isinstance(replica.refused("UnloadAdapter", "two", drain_timeout=-1.0), InvalidArgument)


def test_a_load_while_it_drains_calls_the_unload_off(replica: Replica) -> None:
    with replica.running("one") as answer, ThreadPoolExecutor(1) as pool:
        unload = pool.submit(replica.refused, "UnloadAdapter", "one")
        eventually(lambda: replica.resident("one").state == "DRAINING")
        assert replica.call("LoadAdapter", "one").tier == GPU
        assert isinstance(unload.result(timeout=60), Cancelled)
        assert len(replica.ask("one").token_ids) == 4
        assert len(answer.result(timeout=60).token_ids) == LONG


def test_pins(replica: Replica) -> None:
    assert replica.call("PinAdapter", "one").identity.adapter == "default/one"
    for adapter in ("two", "three") * 3:
        replica.ask(adapter)
        assert (replica.resident("one").tier, replica.resident("one").pinned) == ("GPU", True)
    replica.call("PinAdapter", "two")
    error = replica.refused("PinAdapter", "three")
    assert isinstance(error, ResourceExhausted) and "--max-loras" in error.message
    assert len(replica.ask("three").token_ids) == 4, "two pins for two slots, and yet it is served"
    replica.call("UnpinAdapter", "two")
    replica.call("PinAdapter", "three")
    replica.call("UnloadAdapter", "one")
    assert not replica.resident("one").pinned


def test_an_alias_moved_under_load(replica: Replica, tiny_model: Path, tmp_path: Path) -> None:
    """Requests that run end on the version they began with; later ones get the new one; none fails."""
    made = make_random_adapter(tmp_path / "new", tiny_model, seed=9, base_model_name_or_path=TINY_BASE)
    first = replica.store.register("moving", replica.root / "one", TINY_BASE).identity
    second = replica.store.register("moving", made, TINY_BASE).identity
    expected = {
        identity.digest: replica.ask(f"moving@{identity.version}", 40).token_ids for identity in (first, second)
    }
    target = [admin_pb2.WeightedVersion(version=second.version, weight=1)]
    with ThreadPoolExecutor(8) as pool:
        before = [pool.submit(replica.ask, "moving", 40) for _ in range(12)]
        replica.store.admin().SetAlias(admin_pb2.SetAliasRequest(adapter="moving", alias="stable", targets=target))
        after: list[Answer] = []
        eventually(lambda: after.append(replica.ask("moving", 40)) or after[-1].started.digest == second.digest)
        answers = [future.result(timeout=60) for future in before] + after
    assert {answer.started.digest for answer in answers} == {first.digest, second.digest}
    assert all(answer.token_ids == expected[answer.started.digest] for answer in answers)


def test_adapters_are_loaded_from_a_path(replica: Replica, tiny_model: Path) -> None:
    """Registered in the store, so that every replica has it; a second upload is not live by accident."""
    for seed, name in enumerate(("first", "second")):
        make_random_adapter(
            replica.root / "by-path" / name, tiny_model, seed=20 + seed, base_model_name_or_path=TINY_BASE
        )
    answer = replica.post("/v1/load_lora_adapter", lora_name="by-path", lora_path="by-path/first")
    assert answer.status_code == 200, answer.text
    assert answer.text.startswith("Success: LoRA adapter 'by-path' added successfully")
    assert replica.ask("by-path").started.version == 1
    again = replica.call("LoadAdapter", "by-path", path=str(replica.root / "by-path" / "first"))
    assert again.identity.version == 1, "the same files are the same version"
    assert replica.call("LoadAdapter", "by-path", path="by-path/second").identity.version == 2
    assert (replica.ask("by-path").started.version, replica.ask("by-path@2").started.version) == (1, 2)
    body = {"lora_name": "by-path", "lora_path": "by-path/second", "load_inplace": True}
    assert replica.post("/v1/load_lora_adapter", **body).status_code == 200
    assert replica.ask("by-path").started.version == 2
    answer = replica.post("/v1/unload_lora_adapter", lora_name="by-path")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'by-path' removed successfully.")
    answer = replica.post("/v1/unload_lora_adapter", lora_name="by-path")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "lora_name")
    assert replica.post("/v1/load_lora_adapter", lora_name="by-path").status_code == 200, "the store's, without a path"
    assert replica.ask("by-path").started.version == 2


def test_paths_outside_the_root_are_refused(replica: Replica, tmp_path: Path) -> None:
    shutil.copytree(replica.root / "one", tmp_path / "outside")
    (replica.root / "link").symlink_to(tmp_path / "outside")
    linked = replica.root / "linked-file"
    linked.mkdir()
    shutil.copy(replica.root / "one" / "adapter_config.json", linked)
    (linked / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    for path in ("../..", "/", "/etc", str(tmp_path / "outside"), "link", "linked-file", "one/../../../x", "a\0b"):
        error = replica.refused("LoadAdapter", "bad", path=path)
        assert isinstance(error, PermissionDenied) and error.field == "path", path
    error = replica.refused("LoadAdapter", "bad", path="nothing-here")
    assert isinstance(error, NotFound) and error.field == "path"
    answer = replica.post("/v1/load_lora_adapter", lora_name="bad", lora_path="/etc")
    assert (answer.status_code, answer.json()["error"]["param"]) == (403, "lora_path")
    for body in ({}, {"lora_name": ""}, {"lora_name": "one", "lora_path": 3}, {"lora_name": "one", "colour": "red"}):
        assert replica.post("/v1/load_lora_adapter", **body).status_code == 400


def test_a_replica_without_a_root_or_a_store(tiny_model: Path, replica: Replica, tmp_path: Path) -> None:
    with run_inference(inference_config(tiny_model, tmp_path / "other", threads=1)) as server:
        alone = Replica(server, replica.store, replica.root)
        error = alone.refused("LoadAdapter", "one", path="one")
        assert isinstance(error, FailedPrecondition) and "--adapter-root" in error.message
        assert isinstance(alone.refused("LoadAdapter", "one"), NotFound)


def test_a_copy_that_fails_fails_its_adapter_alone(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from services.inference.adapters.slot_pool import SlotPool

    caplog.set_level(logging.CRITICAL)
    expected = replica.ask("one").token_ids

    def fault(*_: object) -> None:
        raise MemoryError("no room for the copy")

    with monkeypatch.context() as patched:
        patched.setattr(SlotPool, "_copy", fault)
        error = failure(replica.server.address, request("x", adapter="two"))
        assert (error.reason, error.field) == ("ADAPTER_FAILED", "adapter")
        assert replica.ask("one").token_ids == expected
    assert failure(replica.server.address, request("x", adapter="two")).retry_after
    assert replica.resident("two").state == "FAILED"
