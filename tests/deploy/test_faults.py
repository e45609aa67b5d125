"""What keeps a pod from starting is its last line, which the chart makes the termination message; what happens later,
its readiness."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from multilora.adapter_store.v1 import store_pb2, store_pb2_grpc
from services.bench import servers
from services.bench.certificates import Authority
from services.common.rpc import from_rpc_error
from tests.assets.random_adapter import make_random_adapter
from tests.conftest import ROOT, TINY_BASE, run_store
from tests.contracts.redis_server import run_redis

S3 = ("--blobs", "s3://bucket/prefix", "--s3-endpoint-url", "http://127.0.0.1:1")
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "the-secret"}
NO_KEYS = dict.fromkeys(KEYS, "") | {"AWS_EC2_METADATA_DISABLED": "true"}

Last = Callable[..., str]


@pytest.fixture
def last_line(tmp_path: Path) -> Last:
    """Of a service that does not start."""

    def run(service: str, *flags: str, environment: dict[str, str] | None = None) -> str:
        command = [sys.executable, "-m", f"services.{service}", "--port", "0", "--data-dir", str(tmp_path), *flags]
        environment = os.environ | {"HOME": str(tmp_path)} | (environment or {})
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode in (1, 2), ended.stderr
        assert ended.stdout == ""
        assert "Traceback" not in ended.stderr
        assert "the-secret" not in ended.stderr
        return ended.stderr.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("flags", "environment", "says"),
    [
        (("--index", "redis://:the-secret@127.0.0.1:1/0"), {}, "check that this Redis is up"),
        (S3, KEYS, "check that the S3 server is up"),
        (S3, NO_KEYS, "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ],
    ids=["Redis is away", "S3 is away", "S3's secret is missing"],
)
def test_a_store_without_what_it_stands_on(
    last_line: Last, flags: tuple[str, ...], environment: dict[str, str], says: str
) -> None:
    line = last_line("adapter_store", *flags, environment=environment)
    assert line.startswith("multilora-adapter-store: cannot start: ")
    assert says in line


@pytest.mark.parametrize("service", ["adapter_store", "inference"])
def test_secrets_that_are_missing_or_expired(service: str, last_line: Last, tmp_path: Path, tiny_model: Path) -> None:
    model = ("--model", str(tiny_model), "--http-port", "-1") if service == "inference" else ()
    old, none = Authority(tmp_path / "authority").issue("old", days=-1), str(tmp_path / "none")
    expired = ("--tls-cert", str(old.cert), "--tls-key", str(old.key))
    for flags, says in (
        (("--tokens", none), f"--tokens: {none} cannot be read"),
        (("--tls-cert", none, "--tls-key", none), f"--tls-cert: {none} cannot be read"),
        (expired, f"--tls-cert: {old.cert}: certificate has expired"),
    ):
        assert says in last_line(service, *model, *flags)


def test_a_replica_without_room_or_secret(last_line: Last, tmp_path: Path, tiny_model: Path) -> None:
    model, none = ("--model", str(tiny_model), "--http-port", "-1"), str(tmp_path / "none")
    small = ("--kv-cache-memory-bytes", "100", "--no-engine-process")
    assert "raise --kv-cache-memory-bytes" in last_line("inference", *model, *small)
    store = ("--adapter-store", "127.0.0.1:1", "--adapter-store-token-file", none)
    assert f"{none} cannot be read" in last_line("inference", *model, *store)
    assert f"--model: nothing is at {none}" in last_line("inference", "--model", none)


def test_a_store_is_ready_while_its_index_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with run_redis(tmp_path / "redis") as redis:
        redis.save()
        flags = ("--index", redis.url(), "--health-port", str(port))
        with run_store(tmp_path / "store", *flags), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=120)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            redis.kill()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            redis.start()
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()


def test_names_are_resolved_while_s3_is_away(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_random_adapter(tmp_path / "adapter", tiny_model, base_model_name_or_path=TINY_BASE)
    with contextlib.ExitStack() as away:
        s3 = away.enter_context(servers.s3(tmp_path / "s3"))
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        with (
            run_store(tmp_path / "store", *s3.flags("prefix")) as store,
            grpc.insecure_channel(store.address) as channel,
        ):
            store.register_base(TINY_BASE, (tiny_model / "config.json").read_text())
            digest = store.register("pirate", adapter, TINY_BASE).identity.pack_digest
            away.close()
            stub = store_pb2_grpc.AdapterStoreServiceStub(channel)
            resolved = stub.ResolveAdapter(store_pb2.ResolveAdapterRequest(reference="pirate"), timeout=60)
            assert resolved.identity.pack_digest == digest
            with pytest.raises(grpc.RpcError) as raised:
                list(stub.PullAdapter(store_pb2.PullAdapterRequest(digest=digest), timeout=120))
            assert from_rpc_error(raised.value).reason == "STORAGE_UNAVAILABLE"
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
