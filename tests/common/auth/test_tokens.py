"""The file of tokens: what is taken, what is refused and how, and that it can change under running services."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from multilora.adapter_store.v1 import store_pb2, store_pb2_grpc
from services.common.auth import tokens as tokens_module
from services.common.auth.credentials import bearer
from services.common.auth.permissions import Role
from services.common.auth.tokens import Tokens, add_token, digest_of
from services.common.errors import InvalidArgument
from services.common.rpc import from_rpc_error
from tests.cli.conftest import run_cli
from tests.conftest import run_store

DIGEST = "0" * 64


@pytest.fixture(params=["tokens.toml", "tokens.json"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


@pytest.fixture
def always_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "LOOK_SECONDS", 0.0)


def test_a_token_is_known_by_its_hash_alone(path: Path) -> None:
    token = add_token(path, name="ci", role=Role.PUBLISHER, tenant="acme")
    assert token not in path.read_text()
    assert digest_of(token).hex() in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    known = Tokens(path)
    caller = known.by_token(token)
    assert caller is not None
    assert (caller.name, caller.role, caller.tenant) == ("ci", Role.PUBLISHER, "acme")
    for wrong in ("", token[:-1], token + "x", digest_of(token).hex(), "mlt_"):
        assert known.by_token(wrong) is None


@pytest.mark.usefixtures("always_looking")
def test_tokens_are_rotated_under_a_running_service(path: Path) -> None:
    old = add_token(path, name="old", role=Role.READER, tenant="acme")
    known = Tokens(path)
    new = add_token(path, name="new", role=Role.READER, tenant="acme")
    assert known.by_token(old) is not None
    assert known.by_token(new) is not None
    path.write_text("")
    assert known.by_token(old) is not None or path.suffix == ".toml"  # an empty file is no JSON
    path.write_text("{}" if path.suffix == ".json" else "")
    assert known.by_token(old) is None


def test_a_watch_ends_when_its_token_is_taken_away(tmp_path: Path) -> None:
    """A call without an end, which would otherwise be let in once for ever; the new token's goes on."""
    tokens = tmp_path / "tokens.toml"
    old = add_token(tokens, name="old", role=Role.REPLICA, tenant="*")
    with (
        run_store(tmp_path / "store", "--tokens", str(tokens)) as store,
        grpc.insecure_channel(store.address) as channel,
    ):
        stub = store_pb2_grpc.AdapterStoreServiceStub(channel)

        def watch(token: str) -> Iterator[store_pb2.WatchAdaptersResponse]:
            answers: Iterator[store_pb2.WatchAdaptersResponse] = stub.WatchAdapters(
                store_pb2.WatchAdaptersRequest(), metadata=bearer(token), timeout=120
            )
            return answers

        watched = watch(old)
        next(watched)
        tokens.unlink()
        new = add_token(tokens, name="new", role=Role.REPLICA, tenant="*")
        with pytest.raises(grpc.RpcError) as raised:
            list(watched)
        assert from_rpc_error(raised.value).reason == "BAD_TOKEN"
        next(watch(new))


@pytest.mark.usefixtures("always_looking")
def test_a_broken_file_leaves_what_was_known(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = add_token(path, name="ci", role=Role.READER, tenant="acme")
    known = Tokens(path)
    path.write_text("[[tokens")
    assert known.by_token(token) is not None
    assert "stays in force" in caplog.text
    path.unlink()
    assert known.by_token(token) is not None


@pytest.mark.usefixtures("always_looking")
def test_limits_change_with_the_file_and_are_kept_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text("[limits]\nconcurrency = 1\n")
    token = add_token(path, name="ci", role=Role.READER, tenant="acme")
    known = Tokens(path)

    def budget() -> object:
        caller = known.by_token(token)
        assert caller is not None
        return caller.budget

    before = budget()
    add_token(path, name="other", role=Role.READER, tenant="beta")
    assert budget() is before
    path.write_text(path.read_text() + "\n[tenants.acme]\nconcurrency = 7\n")
    assert budget() is not before
    assert (known.limits("acme").concurrency, known.limits("beta").concurrency) == (7, 1)


def test_expired_tokens_are_nobodys(path: Path) -> None:
    now = datetime.now(UTC)
    past = add_token(path, name="past", role=Role.READER, tenant="acme", expires=now - timedelta(seconds=1))
    later = add_token(path, name="later", role=Role.READER, tenant="acme", expires=now + timedelta(days=1))
    known = Tokens(path)
    assert known.by_token(past) is None
    assert known.by_token(later) is not None


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"role": "reader", "tenant": "acme", "sha256": DIGEST}, "needs a name"),
        ({"name": "a b", "role": "reader", "tenant": "acme", "sha256": DIGEST}, "needs a name"),
        ({"name": "a", "role": "root", "tenant": "acme", "sha256": DIGEST}, "role must be"),
        ({"name": "a", "role": "reader", "tenant": "Acme!", "sha256": DIGEST}, "every tenant"),
        ({"name": "a", "role": "reader", "tenant": 3, "sha256": DIGEST, "more": 1}, "nothing else"),
        ({"name": "a", "role": "replica", "tenant": "acme", "sha256": DIGEST}, "a replica serves every tenant"),
        ({"name": "a", "role": "reader", "tenant": "acme"}, "either sha256 or certificate"),
        ({"name": "a", "role": "reader", "tenant": "acme", "sha256": DIGEST, "certificate": "x"}, "either sha256"),
        ({"name": "a", "role": "reader", "tenant": "acme", "sha256": "secret"}, "64 lower-case hex digits"),
        ({"name": "a", "role": "reader", "tenant": "acme", "sha256": DIGEST, "expires": "soon"}, "expires"),
        ("a", "nothing else"),
    ],
)
def test_wrong_rows_are_refused_and_not_repeated(tmp_path: Path, row: object, what: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({"tokens": [row]}))
    with pytest.raises(InvalidArgument, match=what) as raised:
        Tokens(path)
    assert str(path) in raised.value.message
    assert "secret" not in raised.value.message


@pytest.mark.parametrize(
    "text",
    [
        "[limits]\nconcurrency = -1",
        "[limits]\nconcurrency = 1.5",
        "[limits]\nspeed = 1",
        "[tenants]\nacme = 1",
        "tokens = 1",
        "other = 1",
        '[[tokens]]\nname = "a"\nrole = "reader"\ntenant = "x"\ncertificate = "a"\n' * 2,
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match="--tokens"):
        Tokens(path)


def test_a_name_is_not_given_twice(path: Path) -> None:
    add_token(path, name="ci", role=Role.READER, tenant="acme")
    before = path.read_text()
    with pytest.raises(InvalidArgument, match="twice"):
        add_token(path, name="ci", role=Role.ADMIN, tenant="acme")
    assert path.read_text() == before


def test_the_command_prints_the_token_once_and_keeps_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    flags = ("--role", "reader", "--tenant", "acme", "--file", str(path), "--expires-in", "30")
    done = run_cli("tokens", "create", "ci", *flags)
    assert done.returncode == 0, done.stderr
    (token,) = done.stdout.split()
    caller = Tokens(path).by_token(token)
    assert caller is not None
    assert caller.tenant == "acme"
    again = run_cli("tokens", "create", "ci", *flags)
    assert again.returncode == 4
    assert "twice" in again.stderr


def test_the_command_shows_the_table() -> None:
    rows = json.loads(run_cli("tokens", "permissions", "--json").stdout)
    calls = {row["call"]: row for row in rows}
    assert calls["AdapterAdminService/DeleteVersion"]["admin"] == "yes"
    assert calls["AdapterAdminService/DeleteVersion"]["publisher"] == ""
    assert calls["GET /health"]["every_tenant_only"] == "open"


def test_looking_up_costs_no_look_at_the_file_each_time(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = add_token(path, name="ci", role=Role.READER, tenant="acme")
    known = Tokens(path)
    path.unlink()
    began = time.monotonic()
    while known.by_token(token) is not None and time.monotonic() - began < 0.01:
        pass
    assert known.by_token(token) is not None
