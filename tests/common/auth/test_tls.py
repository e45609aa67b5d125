"""TLS, client certificates, what starts a service and what does not."""

from __future__ import annotations

import hashlib
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc
from services.bench.certificates import Authority, Pair
from services.common.auth.credentials import Credentials
from services.common.auth.permissions import Role
from services.common.auth.tls import Tls
from services.common.auth.tokens import add_token
from services.common.errors import InvalidArgument, MultiloraError
from services.common.rpc import from_rpc_error
from tests.common.auth.conftest import World
from tests.conftest import ROOT, run_store


@pytest.fixture(scope="module")
def shown(authority: Authority) -> Pair:
    return authority.issue("server")


def tls_flags(shown: Pair) -> tuple[str, ...]:
    return ("--tls-cert", str(shown.cert), "--tls-key", str(shown.key))


def error_of(address: str, credentials: Credentials) -> MultiloraError | None:
    with credentials.channel(address) as channel:
        stub = admin_pb2_grpc.AdapterAdminServiceStub(channel)
        try:
            stub.ListAdapters(admin_pb2.ListAdaptersRequest(), timeout=30, metadata=credentials.metadata())
        except grpc.RpcError as error:
            return from_rpc_error(error)
    return None


def test_plain_text_and_unknown_authorities_are_not_spoken_to(world: World, tmp_path: Path) -> None:
    token = world.tokens["acme-reader"]
    for credentials in (Credentials(token=token), Credentials(ca=Authority(tmp_path).ca, token=token)):
        error = error_of(world.store_admin, credentials)
        assert error is not None
        assert error.code == "UNAVAILABLE"
    assert error_of(world.store_admin, Credentials(ca=world.authority.ca, token=token)) is None


def test_clients_show_certificates_that_name_them(authority: Authority, shown: Pair, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    token = add_token(tokens, name="by-token", role=Role.READER, tenant="acme")
    tokens.write_text(
        tokens.read_text()
        + '\n[[tokens]]\nname = "by-cert"\nrole = "reader"\ntenant = "acme"\ncertificate = "worker"\n'
    )
    flags = (*tls_flags(shown), "--tls-client-ca", str(authority.ca), "--tokens", str(tokens))
    worker, stranger = authority.issue("worker"), authority.issue("stranger")
    other = Authority(tmp_path / "other").issue("worker")
    expired = authority.issue("worker-of-old", days=-1)
    with run_store(tmp_path / "store", *flags) as store:

        def tried(pair: Pair | None, token: str = "") -> str:
            cert, key = (pair.cert, pair.key) if pair is not None else (None, None)
            error = error_of(store.address, Credentials(ca=authority.ca, cert=cert, key=key, token=token))
            return "" if error is None else error.reason

        assert tried(None, token) == tried(other, token) == tried(expired, token) == "UNAVAILABLE"
        assert tried(worker) == ""
        assert tried(stranger) == "NO_TOKEN"
        assert tried(stranger, token) == ""


def test_a_ca_alone_says_who_may_call(authority: Authority, shown: Pair, tmp_path: Path) -> None:
    worker = authority.issue("operator")
    with run_store(tmp_path / "store", *tls_flags(shown), "--tls-client-ca", str(authority.ca)) as store:
        credentials = Credentials(ca=authority.ca, cert=worker.cert, key=worker.key)
        assert error_of(store.address, credentials) is None


def fingerprint(host_and_port: str, authority: Authority) -> str:
    """Of the certificate that is shown to a new connection."""
    host, port = host_and_port.rsplit(":", 1)
    context = ssl.create_default_context(cafile=str(authority.ca))
    with (
        socket.create_connection((host, int(port)), timeout=30) as connection,
        context.wrap_socket(connection, server_hostname="localhost") as encrypted,
    ):
        der = encrypted.getpeercert(binary_form=True)
    assert der is not None
    return hashlib.sha256(der).hexdigest()


def test_certificates_are_renewed_under_running_services(world: World) -> None:
    """World's, so last among what changes nothing for others: the new one is of the same authority."""
    addresses = [world.store, world.store_admin, world.inference.address, world.https.removeprefix("https://")]
    before = {fingerprint(address, world.authority) for address in addresses}
    assert len(before) == 1
    world.authority.issue("localhost")  # in place
    fingerprint(addresses[-1], world.authority)  # HTTP's first handshake finds the files changed
    after = {fingerprint(address, world.authority) for address in addresses}
    assert len(after) == 1
    assert after != before


def test_certificates_that_cannot_be_shown_are_refused(authority: Authority, shown: Pair, tmp_path: Path) -> None:
    old = authority.issue("old", days=-1)
    with pytest.raises(InvalidArgument, match="expired"):
        Tls(old.cert, old.key)
    with pytest.raises(InvalidArgument, match="no certificate and its key"):
        Tls(shown.cert, old.key)
    with pytest.raises(InvalidArgument, match=r"--tls-key: .*cannot be read"):
        Tls(shown.cert, tmp_path / "none")


@contextmanager
def ended(module: str, *flags: str) -> Iterator[str]:
    """What a service says that refuses to start: one line, and exit code 2."""
    command = [sys.executable, "-m", f"services.{module}", "--port", "0", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    yield done.stderr.strip().splitlines()[-1]


def test_open_services_start_on_loopback_only(tmp_path: Path, tiny_model: Path) -> None:
    everywhere = ("--host", "0.0.0.0")
    own = {"adapter_store": ("--data-dir", str(tmp_path / "s")), "inference": ("--model", str(tiny_model))}
    for module, flags in own.items():
        with ended(module, *flags, *everywhere) as line:
            assert "--tokens FILE" in line
            assert "--insecure" in line
    with run_store(tmp_path / "store", *everywhere, "--insecure") as store:
        assert error_of(store.address.replace("0.0.0.0", "127.0.0.1"), Credentials()) is None


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--tls-cert", "x.pem"), "--tls-key go together"),
        (("--tls-client-ca", "x.pem"), "--tls-client-ca needs"),
        (("--tls-cert", "x.pem", "--tls-key", "x.key"), "--tls-cert: x.pem cannot be read"),
        (("--tokens", "none.toml"), "--tokens: none.toml cannot be read"),
        (("--audit-log", "no/such/place"), "--audit-log: no/such/place"),
        (("--admin-port", "70000"), "--admin-port is 70000"),
        (("--health-port", "0"), "--health-port is 0"),
    ],
)
def test_wrong_flags_are_named(tmp_path: Path, flags: tuple[str, ...], what: str) -> None:
    with ended("adapter_store", "--data-dir", str(tmp_path), *flags) as line:
        assert what in line


def test_health_alone_is_in_plain_text_where_clients_show_certificates(
    authority: Authority, shown: Pair, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = (*tls_flags(shown), "--tls-client-ca", str(authority.ca), "--health-port", str(port))
    with run_store(tmp_path / "store", *flags), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        error = error_of(f"127.0.0.1:{port}", Credentials())
        assert error is not None
        assert error.code == "UNIMPLEMENTED"
