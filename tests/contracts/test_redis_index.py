"""What is particular to Redis: what it forgets is noticed and healed, and whoever it keeps out is told why."""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis._parsers.base import BaseParser

from services.adapter_store.blobs.disk import DiskBlobs
from services.adapter_store.index.interface import Stored, Write
from services.adapter_store.index.redis import RedisIndex
from services.adapter_store.index.redis_config import RedisConfig
from services.adapter_store.index.redis_errors import redis_errors
from services.adapter_store.log.disk import DiskLog
from services.adapter_store.store import AdapterStore
from services.common.errors import FailedPrecondition, InvalidArgument, MultiloraError, ResourceExhausted, Unavailable
from services.common.references import AdapterReference
from tests.adapter_store.test_fold import PROFILE
from tests.adapter_store.test_journal import NAME, add_version
from tests.contracts.redis_server import APP_PASSWORD, RedisServer, has_tls, run_redis

REFERENCE = AdapterReference(NAME, None, "stable")
STREAM = f"adapters/{NAME}"
PREFIX = "test"


def config(server: RedisServer, prefix: str = PREFIX, **settings: object) -> RedisConfig:
    return dataclasses.replace(RedisConfig.parse(server.url(), prefix, {}), **({"retries": 1} | settings))  # type: ignore[arg-type]


def open_store(directory: Path, server: RedisServer) -> AdapterStore:
    entries = DiskLog(directory)
    return AdapterStore(DiskBlobs(directory), entries, RedisIndex(config(server)), max_upload_bytes=0)


@pytest.fixture
def stores(own_redis: RedisServer, tmp_path: Path) -> Iterator[list[AdapterStore]]:
    """Two processes' stores on one log and one Redis: one version of acme/x, saved, and then another, not saved."""
    opened = [open_store(tmp_path / "data", own_redis) for _ in range(2)]
    for store in opened:
        store.heal()
    opened[0].changes.register_base_model(PROFILE)
    add_version(opened[0], 0)
    own_redis.save()
    add_version(opened[1], 1)
    yield opened
    for store in opened:
        store.close()


def resolved(store: AdapterStore) -> list[int]:
    return [version.number for version in store.catalog.resolve(REFERENCE).values()]


def rolled_back(server: RedisServer) -> None:
    server.restart()


def restarted_empty(server: RedisServer) -> None:
    server.kill()
    (server.directory / "dump.rdb").unlink()
    server.start()


@pytest.mark.parametrize("lose", [RedisServer.wipe, restarted_empty, rolled_back])
def test_what_redis_forgot_is_in_the_log(
    stores: list[AdapterStore], own_redis: RedisServer, lose: Callable[[RedisServer], None]
) -> None:
    indexes = [store.journal.index for store in stores]
    before, epoch = indexes[0].get(STREAM), indexes[0].position().epoch
    totals = indexes[0].totals()
    lose(own_redis)
    for store in stores:
        for _ in range(2):  # never an old answer, nor that there is none
            with pytest.raises(Unavailable, match="INDEX_HEALING"):
                store.catalog.resolve(REFERENCE)
        store.journal.index.position()
        assert store.journal.index.suspect()
        with pytest.raises(Unavailable, match="INDEX_HEALING"):
            add_version(store, 2)
    assert stores[0].journal.heal() > 0
    assert not indexes[0].suspect()
    assert indexes[0].get(STREAM) == before
    assert indexes[0].totals() == totals
    healed = indexes[0].position()
    assert healed.epoch != epoch
    with pytest.raises(Unavailable, match="INDEX_HEALING"):  # each compares for itself
        stores[1].catalog.resolve(REFERENCE)
    assert stores[1].journal.heal() == 0
    assert indexes[1].position() == healed  # and does not send watchers away for nothing
    assert resolved(stores[1]) == [1]
    assert [add_version(store, seed) for seed, store in enumerate(stores, 2)] == [3, 4]


def test_a_restart_that_lost_nothing_changes_nothing(stores: list[AdapterStore], own_redis: RedisServer) -> None:
    before = stores[0].journal.index.position()
    own_redis.save()
    own_redis.restart()
    for store in stores:
        with pytest.raises(Unavailable, match="INDEX_HEALING"):
            store.catalog.resolve(REFERENCE)
        assert store.journal.heal() == 0
        assert resolved(store) == [1]
        assert store.journal.index.position() == before
    assert add_version(stores[0], 2) == 3


def test_a_wipe_while_it_is_healed_is_noticed(stores: list[AdapterStore], own_redis: RedisServer) -> None:
    index = stores[0].journal.index
    own_redis.wipe()
    with index.healing() as readable:
        assert readable.get(STREAM) is None
        own_redis.wipe()
    index.position()
    assert index.suspect()
    with index.healing():
        own_redis.restart()
    index.position()
    assert index.suspect()
    stores[0].heal()
    assert resolved(stores[0]) == [1]


def test_what_a_rebuild_wrote_before_it_died_expires(own_redis: RedisServer) -> None:
    index = RedisIndex(config(own_redis), lease_seconds=0.3)
    other = RedisIndex(config(own_redis), lease_seconds=0.3)
    index.apply(Write(STREAM, 1, "{}", "{}"))
    kept = own_redis.keys()
    rebuild = index.rebuild()
    rebuild.__enter__().apply(Write("adapters/acme/new", 1, "{}", "{}", {"1": "{}"}, ["sha256:1"], 1))
    assert {key for key in own_redis.keys() - kept if ":new:" not in key} == {f"{{{PREFIX}}}:lease"}
    waited = threading.Event()

    def write() -> None:
        assert other.apply(Write(STREAM, 2, "{}", "{}")) == 2
        waited.set()

    thread = threading.Thread(target=write)
    thread.start()  # it waits until the lease is over
    thread.join()
    assert waited.is_set()
    assert own_redis.keys() == kept
    with pytest.raises(Unavailable, match="INDEX_REBUILD_INTERRUPTED"):
        rebuild.__exit__(None, None, None)
    assert index.get(STREAM) == Stored(2, "{}")
    with own_redis.admin() as admin:  # one that lives longer than others wait
        admin.set(f"{{{PREFIX}}}:lease", "of a third", ex=60)
    for call in (lambda: other.apply(Write(STREAM, 3, "{}", "{}")), other.rebuild().__enter__):
        with pytest.raises(Unavailable, match="INDEX_REBUILDING"):
            call()
    index.close()
    other.close()


def test_stores_with_prefixes_of_their_own_share_a_server(redis_server: RedisServer) -> None:
    prefixes = [f"test-{secrets.token_hex(8)}" for _ in range(2)]
    indexes = [RedisIndex(config(redis_server, prefix)) for prefix in prefixes]
    before = redis_server.keys()
    for index, seq in zip(indexes, (1, 2), strict=True):
        for at in range(1, seq + 1):
            index.apply(Write(STREAM, at, "{}", "{}", {str(at): "{}"}, [f"sha256:{at}"], at))
    assert [index.get(STREAM) for index in indexes] == [Stored(1, "{}"), Stored(2, "{}")]
    assert all(key.startswith(tuple(f"{{{prefix}}}:" for prefix in prefixes)) for key in redis_server.keys() - before)
    for index in indexes:
        index.close()


def test_an_index_of_another_version_is_left_alone(redis_server: RedisServer) -> None:
    prefix = f"test-{secrets.token_hex(8)}"
    index = RedisIndex(config(redis_server, prefix))
    with redis_server.admin() as admin:
        admin.hset(f"{{{prefix}}}:meta", "schema", "99")
    for call in (index.position, lambda: index.apply(Write(STREAM, 1, "{}", "{}")), lambda: index.get(STREAM)):
        with pytest.raises(Unavailable, match="schema 99"):
            call()
    with pytest.raises(Unavailable, match="INDEX_VERSION_UNKNOWN"):
        RedisIndex(config(redis_server, prefix))
    index.close()


def test_a_redis_that_is_away_is_told(own_redis: RedisServer) -> None:
    index = RedisIndex(config(own_redis))
    own_redis.kill()
    for call in (index.position, lambda: index.apply(Write(STREAM, 1, "{}", "{}")), lambda: index.get(STREAM)):
        with pytest.raises(Unavailable, match=f"localhost:{own_redis.port}") as caught:
            call()
        assert caught.value.reason == "INDEX_UNAVAILABLE"
        assert caught.value.retry_after
        assert "secret" not in caught.value.message
    with pytest.raises(Unavailable, match="INDEX_UNAVAILABLE"):
        RedisIndex(config(own_redis))
    own_redis.start()
    index.position()
    index.close()


def test_a_replica_a_full_server_and_one_that_evicts_are_told(own_redis: RedisServer) -> None:
    index = RedisIndex(config(own_redis))
    write = Write(STREAM, 1, "{}", "{}")
    with own_redis.admin() as admin:
        admin.replicaof("localhost", "1")
        with pytest.raises(Unavailable, match="INDEX_UNAVAILABLE") as caught:
            index.apply(write)
        assert caught.value.retry_after
        admin.replicaof("NO", "ONE")
        admin.config_set("maxmemory", 1)
        with pytest.raises(ResourceExhausted, match="INDEX_FULL"):
            index.apply(write)
        admin.config_set("maxmemory", 1 << 30)
        admin.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(FailedPrecondition, match="INDEX_EVICTED"):
            RedisIndex(config(own_redis))
        admin.set(f"{{{PREFIX}}}:seqs", "of another program")
        with pytest.raises(FailedPrecondition, match="INDEX_REFUSED"):
            index.apply(write)
    index.close()


@pytest.fixture(params=["plain", "tls"])
def restricted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    """A server whose user `app` may do what the store does, to keys of one prefix."""
    if request.param == "tls" and not has_tls():
        pytest.skip("TLS needs redis-server and openssl on the PATH")
    with run_redis(tmp_path / "redis", tls=request.param == "tls", prefix=f"{{{PREFIX}}}:*") as server:
        yield server


def test_the_least_rights_are_enough(restricted: RedisServer, tmp_path: Path) -> None:
    index = RedisIndex(RedisConfig.parse(restricted.url("app", APP_PASSWORD), PREFIX, {}))
    store = AdapterStore(DiskBlobs(tmp_path), DiskLog(tmp_path), index, max_upload_bytes=0)
    store.heal()
    store.changes.register_base_model(PROFILE)
    assert [add_version(store, seed) for seed in range(3)] == [1, 2, 3]
    assert store.journal.rebuild() == 4
    index.renew(index.position().epoch)
    assert index.changes(4, 1) == []
    assert resolved(store) == [1]
    assert store.catalog.adapters(None, 10, "")[0]
    assert store.catalog.has_pack(store.catalog.version(NAME, 1).content.pack_digest)
    assert not [problem for problem in store.verify().problems if "not there" not in problem]
    assert index.named(NAME.name) == STREAM
    restricted.wipe()
    with pytest.raises(Unavailable):
        store.catalog.resolve(REFERENCE)
    store.heal()
    assert store.catalog.totals().versions == 3
    store.close()


def test_who_may_not_is_told_without_the_password(restricted: RedisServer) -> None:
    wrong = [
        RedisConfig.parse(restricted.url("app", "wrong-secret"), PREFIX, {}),
        RedisConfig.parse(restricted.url("nobody", "wrong-secret"), PREFIX, {}),
        RedisConfig.parse(restricted.url("app", APP_PASSWORD), "other", {}),  # keys that are not the user's
    ]
    for each in wrong:
        with pytest.raises(FailedPrecondition, match=f"localhost:{restricted.port}") as caught:
            RedisIndex(each)
        assert caught.value.reason == "INDEX_ACCESS_DENIED"
        assert not [secret for secret in ("wrong-secret", APP_PASSWORD) if secret in str(caught.value)]
        assert "secret" not in repr(each)


def test_no_user_and_no_trust_are_told(restricted: RedisServer) -> None:
    """Without a user the server refuses; with TLS, so does a client that does not know the authority."""
    known = RedisConfig.parse(restricted.url("app", APP_PASSWORD), PREFIX, {})
    with pytest.raises(FailedPrecondition, match="INDEX_ACCESS_DENIED"):
        RedisIndex(dataclasses.replace(known, username="", password=""))
    if known.tls:
        for wrong in ({"ca_certs": ""}, {"tls": False}):
            with pytest.raises(Unavailable, match="INDEX_UNAVAILABLE"):
                RedisIndex(dataclasses.replace(known, **wrong, retries=0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("LOADING Redis is loading the dataset in memory", "INDEX_UNAVAILABLE"),
        ("READONLY You can't write against a read only replica.", "INDEX_UNAVAILABLE"),
        ("MASTERDOWN Link with MASTER is down", "INDEX_UNAVAILABLE"),
        ("CLUSTERDOWN The cluster is down", "INDEX_UNAVAILABLE"),
        ("MISCONF Redis is configured to save RDB snapshots, but it's unable to persist to disk", "INDEX_UNAVAILABLE"),
        ("NOREPLICAS Not enough good replicas to write.", "INDEX_UNAVAILABLE"),
        ("BUSY Redis is busy running a script.", "INDEX_UNAVAILABLE"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "INDEX_FULL"),
        ("NOPERM this user has no permissions to run the 'hset' command", "INDEX_ACCESS_DENIED"),
        ("NOAUTH Authentication required.", "INDEX_ACCESS_DENIED"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "INDEX_ACCESS_DENIED"),
        ("ERR The user executing the script can't run this command or subcommand", "INDEX_ACCESS_DENIED"),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", "INDEX_REFUSED"),
    ],
)
def test_answers_become_typed_errors(answer: str, reason: str) -> None:
    with pytest.raises(MultiloraError) as caught, redis_errors("redis://h:1/0"):
        raise BaseParser.parse_error(answer)
    assert caught.value.reason == reason
    assert "redis://h:1/0" in caught.value.message
    assert (caught.value.retry_after is not None) == (reason in ("INDEX_UNAVAILABLE", "INDEX_FULL"))


def test_a_suspect_index_does_not_say_what_the_log_must_list(
    stores: list[AdapterStore], own_redis: RedisServer
) -> None:
    own_redis.wipe()
    with pytest.raises(Unavailable, match="INDEX_HEALING"):
        stores[0].collection.collect(dry_run=False)
    stores[0].heal()
    stores[0].collection.collect(dry_run=True)


def test_nothing_of_an_index_expires(redis_server: RedisServer) -> None:
    prefix = f"test-{secrets.token_hex(8)}"
    index = RedisIndex(config(redis_server, prefix))
    write = Write(STREAM, 1, "{}", "{}", {"1": "{}"}, ["sha256:1"], 1)
    index.apply(write)
    with index.rebuild() as writer:
        writer.apply(write)
    index.apply(dataclasses.replace(write, seq=2, documents={"2": "{}"}))
    with redis_server.admin() as admin:
        keys = list(admin.scan_iter(f"{{{prefix}}}:*"))
        assert len(keys) == 9
        assert {admin.ttl(key) for key in keys} == {-1}
    index.close()


def test_addresses() -> None:
    environment = {"REDIS_USERNAME": "env", "REDIS_PASSWORD": "hidden", "REDIS_CA_CERTS": "/ca.pem"}
    assert RedisConfig.parse("redis://a", "", environment) == RedisConfig("a", username="env", password="hidden")
    assert RedisConfig.parse(
        "rediss://u:p%40%2F@[::1]:7/3?ssl_certfile=c&ssl_keyfile=k", "p", environment
    ) == RedisConfig("::1", 7, 3, "u", "p@/", tls=True, ca_certs="/ca.pem", certfile="c", keyfile="k", prefix="p")
    assert RedisConfig.parse("rediss://u:p@[::1]/2", "", {}).where == "rediss://[::1]:6379/2"


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://:hidden@",
        "redis://u:hidden@h:port",
        "redis://u:hidden@h:99999",
        "redis://u:hidden@h/x",
        "redis://u:hidden@h/0?ssl_ca_certs=x",
        "rediss://u:hidden@h/0?password=hidden",
        "rediss://u:hid/den@h/0",
    ],
)
def test_wrong_addresses_are_refused_without_the_password(url: str) -> None:
    with pytest.raises(InvalidArgument, match="redis://host:port/db") as caught:
        RedisConfig.parse(url, "", {})
    assert "hid" not in caught.value.message.replace("ssl_", "")


def test_a_prefix_is_plain() -> None:
    with pytest.raises(InvalidArgument, match="--redis-prefix"):
        RedisConfig.parse("redis://h", "{a}", {})
