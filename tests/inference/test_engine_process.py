"""The face and the engine as two processes: refusals at start, deaths of either, and clients that do not read."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from services.bench.stub_engine import stub_engine
from services.common.errors import DataLoss, Internal, ResourceExhausted
from services.common.rpc import from_rpc_error
from services.inference.config import ConfigError
from services.inference.engine.messages import RequestOutput
from services.inference.hosting.process import ProcessHost
from services.inference.hosting.wire import Decoder, encode, portable
from services.inference.server import serve
from tests.clients import request
from tests.conftest import ROOT, inference_config

SERVICE = "multilora.inference.v1.InferenceService"
STUB = functools.partial(stub_engine, [5, 6, 7, 8], 0.0)


@contextmanager
def service(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """`multilora-inference` with these flags: its process, its gRPC address and the pid of its engine."""
    flags = ("--port", "0", "--http-port", "-1", "--admin-port", "-1", "--threads", "1", "--engine-process", *arguments)
    command = [sys.executable, "-m", "services.inference", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            address = running.stdout.readline().strip().removeprefix("listening on grpc=")
            children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
            yield running, address, int(children[0])
        finally:
            if running.poll() is None:
                running.kill()


def wait_gone(pid: int) -> None:
    """Return when the process has ended, whoever its parent is by now."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        assert poller.poll(20_000), f"process {pid} lives on"
    finally:
        os.close(fd)


def test_a_killed_engine_ends_its_streams_and_the_service(tiny_model: Path, tmp_path: Path) -> None:
    with service("--model", str(tiny_model), "--data-dir", str(tmp_path)) as (running, address, engine):
        with grpc.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request([5, 6, 7], max_tokens=1000))
            assert next(call).HasField("started")
            os.kill(engine, signal.SIGKILL)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as ended:
                list(call)
        error = from_rpc_error(ended.value)
        assert isinstance(error, Internal) and error.reason == "ENGINE_DIED"
        assert running.wait(timeout=20) == 70
        assert running.stderr is not None
        last = running.stderr.read().strip().splitlines()[-1]
        assert last == "multilora-inference: the engine has died: the engine's process was killed by SIGKILL"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_engine_outlives_its_face(number: signal.Signals, tiny_model: Path, tmp_path: Path) -> None:
    with service("--model", str(tiny_model), "--data-dir", str(tmp_path)) as (running, address, engine):
        os.kill(engine, signal.SIGTERM)  # not the engine's business
        with grpc.insecure_channel(address) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request([5, 6, 7], max_tokens=5))
            assert [event.WhichOneof("event") for event in call][-1] == "finished"
        running.send_signal(number)
        assert running.wait(timeout=20) == (-number if number == signal.SIGKILL else 0)
        wait_gone(engine)


def test_what_building_it_raises_is_raised_here(tiny_model: Path, tmp_path: Path) -> None:
    async def start() -> None:
        async with serve(inference_config(tiny_model, tmp_path, engine_process=True, kv_cache_memory_bytes=4096)):
            raise AssertionError("an engine without room was served")

    with pytest.raises(ConfigError, match="raise --kv-cache-memory-bytes"):
        asyncio.run(start())


def test_an_engine_that_ends_while_it_starts() -> None:
    async def start() -> None:
        host = ProcessHost(functools.partial(STUB, None, None))
        host.process.kill()
        try:
            await host.ready()
        finally:
            await host.close()

    with pytest.raises(Internal, match="while it started, the engine's process was killed by SIGKILL"):
        asyncio.run(start())


class Unwilling(Exception):
    """Pickles, and cannot be made again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def test_errors_cross_or_are_told() -> None:
    error = DataLoss("DIGEST_MISMATCH", "not what it was", field="adapter", retry_after=2.0, digest="ab")
    (there,) = Decoder().feed(encode(portable(error)))
    assert (type(there), vars(there)) == (DataLoss, vars(error))
    told = portable(Unwilling("a", "b"))
    assert type(told) is RuntimeError
    assert str(told) == "Unwilling: ab"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_frames_however_they_are_cut(size: int) -> None:
    messages = [RequestOutput("r", (1, 2)), "x" * 500, [None]]
    data = b"".join(map(encode, messages))
    decoder = Decoder()
    cut = [data[start : start + size] for start in range(0, len(data), size)]
    assert [message for piece in cut for message in decoder.feed(piece)] == messages


async def read_all(call: Any) -> list[inference_pb2.GenerateResponse]:
    return [event async for event in call]


SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
"""A client that takes in no more than 64 KiB ahead of its reader, however fast the connection is."""


@pytest.mark.parametrize("engine_process", [True, False])
def test_a_client_that_does_not_read(
    engine_process: bool, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is cancelled once its buffers are full, and told so when it reads on; others are served meanwhile."""
    model = tmp_path / "long"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 30}))
    settings = {"engine_process": engine_process, "max_unread_tokens": 2000}

    async def main() -> None:
        async with (
            serve(inference_config(model, tmp_path, **settings), STUB) as running,
            grpc.aio.insecure_channel(f"127.0.0.1:{running.port}", options=SMALL_WINDOW) as channel,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            slow = stub.Generate(request([5, 6, 7], max_tokens=1 << 20))
            assert (await anext(aiter(slow))).HasField("started")
            while "its client does not read" not in caplog.text:
                others = stub.Generate(request([5], max_tokens=500))
                assert sum(len(event.chunk.token_ids) for event in await read_all(others)) == 500
            with pytest.raises(grpc.RpcError) as ended:
                await read_all(slow)
            error = from_rpc_error(ended.value)
            assert isinstance(error, ResourceExhausted) and error.reason == "CLIENT_TOO_SLOW"

    asyncio.run(main())
