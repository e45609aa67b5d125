"""The real process: its flags, its start, its end, and what a crash leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc
from services.adapter_store.__main__ import parse_arguments
from services.common.errors import InvalidArgument
from tests.adapter_store import uploads
from tests.adapter_store.conftest import TIMEOUT_SECONDS, Client
from tests.adapter_store.uploads import WEIGHTS_FILE, chunk, make_adapter, upload_header

ROOT = Path(__file__).parents[2]


class StoreProcess:
    def __init__(self, data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "services.adapter_store",
                "--port",
                "0",
                "--admin-port",
                "-1",
                "--data-dir",
                str(data_dir),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on 127.0.0.1:"), line
        self.client = Client(line.split()[-1])

    def end(self, number: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(number)
        self.client.channel.close()
        _, log = self.process.communicate(timeout=TIMEOUT_SECONDS)
        return self.process.returncode, log


Start = Callable[[], StoreProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[StoreProcess] = []

    def run() -> StoreProcess:
        started.append(StoreProcess(tmp_path / "data"))
        return started[-1]

    yield run
    for store in started:
        if store.process.poll() is None:
            store.end(signal.SIGKILL)


def run_to_end(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.adapter_store", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def test_register_resolve_pull_and_restart(start: Start, tmp_path: Path) -> None:
    store = start()
    health = health_pb2_grpc.HealthStub(store.client.channel)
    for service in ("", "multilora.adapter_store.v1.AdapterStoreService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    store.client.register_base_model()
    identity = store.client.register("acme/x", make_adapter()).version.identity
    data = store.client.pull(identity.pack_digest)
    code, log = store.end(signal.SIGTERM)
    assert code == 0
    assert "registered acme/x@1" in log
    assert "stopped" in log

    again = start()
    assert again.client.resolve("acme/x").identity == identity
    assert again.client.pull(identity.pack_digest) == data
    assert again.client.register("acme/x", make_adapter()).existed
    assert again.end(signal.SIGINT)[0] == 0
    assert not list((tmp_path / "data" / "tmp").iterdir())


def test_a_killed_upload_leaves_nothing(start: Start, tmp_path: Path) -> None:
    store = start()
    store.client.register_base_model()
    store.client.register("x", make_adapter())
    killed = threading.Event()
    weights = make_adapter(seed=1).files()[WEIGHTS_FILE]

    def messages() -> Iterator[admin_pb2.RegisterVersionRequest]:
        yield upload_header("x")
        for _ in range(4):
            yield chunk(WEIGHTS_FILE, weights)
        killed.wait(TIMEOUT_SECONDS)

    stub = admin_pb2_grpc.AdapterAdminServiceStub(store.client.channel)
    call = stub.RegisterVersion.future(messages(), timeout=TIMEOUT_SECONDS)
    tmp = tmp_path / "data" / "tmp"
    while not any(file.stat().st_size for file in tmp.iterdir()):
        store.client.resolve("x")  # a round trip between looks; resolves go on during an upload
    store.end(signal.SIGKILL)
    killed.set()
    with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
        call.result(timeout=TIMEOUT_SECONDS)
    assert list(tmp.iterdir())

    again = start()
    assert not list(tmp.iterdir())
    assert [version.identity.version for version in again.client("ListVersions", adapter="x").versions] == [1]
    assert len(list((tmp_path / "data" / "blobs").rglob("*/*/*"))) == 3
    assert again.client.register("x", make_adapter(seed=1)).version.identity.version == 2


def test_versions_survive_a_kill(start: Start) -> None:
    store = start()
    store.client.register_base_model()
    store.client.register("x", make_adapter())
    store.client.register("x", make_adapter(seed=1))
    store.client("DeleteVersion", adapter="x", version=2)
    store.end(signal.SIGKILL)
    again = start().client
    assert again.resolve("x:latest").identity.version == 1
    assert again.register("x", make_adapter(seed=1)).version.identity.version == 3


def test_two_stores_share_a_directory(start: Start) -> None:
    first, second = start().client, start().client
    first.register_base_model()
    first.register("x", make_adapter())
    assert second.register("x", make_adapter()).existed
    assert second.register("x", make_adapter(seed=1)).version.identity.version == 2
    assert first.resolve("x:latest").identity.version == 2


def test_a_broken_index_is_told(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite3").write_bytes(b"this is no database" * 100)
    result = run_to_end("--port", "0", "--data-dir", str(tmp_path))
    assert result.returncode == 1
    assert "is no SQLite index" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--port", "65536"], "--port"),
        (["--port", "x"], "--port"),
        (["--host", ""], "--host"),
        (["--max-upload-bytes", "0"], "--max-upload-bytes"),
        (["--uri-root", "/no/such/place"], "--uri-root"),
        (["--data-dir", "/dev/null"], "--data-dir"),
        (["--uri-root", "/", "--data-dir", "/tmp/x"], "--uri-root"),
        (["--dat", "x"], "--dat"),
        (["--delete-grace", "-1"], "--delete-grace"),
        (["--delete-grace", "nan"], "--delete-grace"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_invalid_flags_name_themselves(flags: list[str], told: str) -> None:
    with pytest.raises(InvalidArgument, match=told) as caught:
        parse_arguments(flags)
    assert "\n" not in caught.value.message


def test_an_invalid_flag_is_one_line_and_code_2() -> None:
    result = run_to_end("--port", "many")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "--port" in result.stderr


def test_imports_stay_lean() -> None:
    """numpy comes with the first registration, torch never."""
    code = (
        "import sys, services.adapter_store.__main__; heavy = {'torch', 'numpy', 'safetensors'} & set(sys.modules);"
        "assert not heavy, heavy; import services.adapter_store.packing, services.adapter_store.validation;"
        "heavy = {'torch', 'safetensors'} & set(sys.modules); assert not heavy, heavy"
    )
    result: Any = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert uploads.BASE_MODEL
