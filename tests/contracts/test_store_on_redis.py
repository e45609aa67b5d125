"""Store processes with their index in Redis: two of them are one store, and nothing that Redis forgets is lost."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from services.adapter_store.__main__ import main, parse_arguments
from services.adapter_store.config import StoreConfig
from services.common.errors import InvalidArgument, Unavailable
from tests.adapter_store.conftest import Client
from tests.adapter_store.uploads import make_adapter
from tests.conftest import run_store
from tests.contracts.redis_server import APP_PASSWORD, RedisServer
from tests.contracts.s3_server import S3Server

TRIES = 500
INTERVAL_SECONDS = 0.02


@pytest.fixture
def flags(s3_server: S3Server, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("REDIS_USERNAME", "app")
    monkeypatch.setenv("REDIS_PASSWORD", APP_PASSWORD)
    return [
        f"--blobs=s3://{s3_server.bucket}/store-{secrets.token_hex(8)}",
        f"--s3-endpoint-url={s3_server.endpoint_url}",
        f"--s3-region={s3_server.region}",
        f"--index=redis://localhost:{own_redis.port}/0",
    ]


@contextlib.contextmanager
def running(flags: list[str], data_dir: Path) -> Iterator[Client]:
    with run_store(data_dir, *flags) as store:
        client = Client(store.address)
        yield client
        client.channel.close()


def test_two_processes_are_one_store(flags: list[str], tmp_path: Path) -> None:
    with running(flags, tmp_path / "a") as one, running(flags, tmp_path / "b") as two, ThreadPoolExecutor(8) as threads:
        one.register_base_model()
        identity = one.register("acme/x", make_adapter()).version.identity
        assert two.resolve("acme/x").identity == identity
        assert two.pull(identity.pack_digest) == one.pull(identity.pack_digest)
        with two.watch() as events:
            reset = next(events)
            one("SetAlias", adapter="acme/x", alias="canary", targets=[{"version": 1}])
            changed = next(event for event in events if event.adapter)
            assert (changed.epoch, changed.revision) == (reset.epoch, reset.revision + 1)
        registered = threads.map(lambda n: (one, two)[n % 2].register("acme/x", make_adapter(seed=n)), range(1, 13))
        assert sorted(answer.version.identity.version for answer in registered) == list(range(2, 14))
        shown = [client("GetAdapter", adapter="acme/x") for client in (one, two)]
        assert shown[0] == shown[1]
        again = threads.map(lambda client: client.register("acme/x", make_adapter(seed=20)), [one, two] * 3)
        assert {answer.version.identity.version for answer in again} == {14}
        assert list(two("VerifyIntegrity").problems) == []


def test_a_wiped_or_restarted_redis_is_healed_while_stores_run(
    flags: list[str], tmp_path: Path, own_redis: RedisServer
) -> None:
    with running(flags, tmp_path / "a") as one, running(flags, tmp_path / "b") as two:
        one.register_base_model()
        identities = [one.register("acme/x", make_adapter()).version.identity]
        own_redis.save()
        for seed, lose in enumerate([own_redis.restart, own_redis.wipe, own_redis.restart], 1):
            identities.append(two.register("acme/x", make_adapter(seed=seed), promote=True).version.identity)
            with one.watch() as events:
                epoch = next(events).epoch
                lose()
                assert next(event for event in events if event.epoch != epoch).reset
            for client in (one, two):
                assert soon(lambda client=client: client.resolve("acme/x").identity) == identities[-1]
                assert soon(lambda client=client: len(client("ListVersions", adapter="acme/x").versions)) == seed + 1
        assert (
            soon(lambda: one.register("acme/x", make_adapter(seed=9))).version.identity.version == len(identities) + 1
        )
        assert list(soon(lambda: two("VerifyIntegrity")).problems) == []


def soon(call: Callable[[], Any]) -> Any:
    """What a call answers as soon as the store can; nothing but that it cannot yet is taken before."""
    for _ in range(TRIES):
        try:
            return call()
        except Unavailable as error:
            if error.reason not in ("INDEX_HEALING", "INDEX_UNAVAILABLE"):
                raise
        time.sleep(INTERVAL_SECONDS)
    raise AssertionError("the index was not healed")


def test_a_store_tells_where_its_index_is_without_the_password(
    own_redis: RedisServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTILORA_INDEX", own_redis.url())
    monkeypatch.setenv("MULTILORA_REDIS_PREFIX", "mine")
    with run_store(tmp_path):
        assert own_redis.keys() == {"{mine}:meta"}
    own_redis.kill()
    assert main(["--port", "0", "--data-dir", str(tmp_path)]) == 1
    told = capfd.readouterr()
    assert "INDEX_UNAVAILABLE" in told.err
    assert f"localhost:{own_redis.port}" in told.err
    assert "secret" not in told.out + told.err
    assert "secret" not in repr(StoreConfig(index=own_redis.url()))


@pytest.mark.parametrize(
    "wrong",
    [
        ["--index=redis:/x"],
        ["--index=redis://:hidden@"],
        ["--index=valkey://u:hidden@h/0"],
        ["--index=redis://h/0", "--redis-prefix={x}"],
        ["--redis-prefix=x"],
    ],
)
def test_wrong_flags_are_refused(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "0", "--data-dir", str(tmp_path / "data"), *wrong]) == 2
    told = capsys.readouterr().err
    assert "--index" in told or "--redis-prefix" in told
    assert "hidden" not in told


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTILORA_INDEX", "redis://a")
    assert parse_arguments([]).index == "redis://a"
    assert parse_arguments(["--index=redis://b"]).index == "redis://b"
    with pytest.raises(InvalidArgument, match="--redis-prefix"):
        parse_arguments(["--index=x.sqlite3", "--redis-prefix=x"])
