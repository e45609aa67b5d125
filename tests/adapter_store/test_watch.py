"""Watch: every change in order, once; and who cannot be told is told to list again."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from multilora.adapter_store.v1 import store_pb2
from multilora.common.v1 import common_pb2
from services.common.errors import Unavailable
from services.common.rpc import from_rpc_error
from tests.adapter_store.conftest import Client, RunningStore, make_store
from tests.adapter_store.uploads import make_adapter

Answers = Iterator[store_pb2.WatchAdaptersResponse]


def changes(answers: Answers, count: int) -> list[store_pb2.WatchAdaptersResponse]:
    """The next changes and resets; heartbeats are left out."""
    return list(itertools.islice((answer for answer in answers if not answer.heartbeat), count))


def start(client: Client) -> dict[str, Any]:
    """Where a client is that has seen everything: a reset, then what was not yet read at that moment, then silence."""
    with client.watch() as answers:
        assert next(answers).reset
        beat = next(answer for answer in answers if answer.heartbeat)
    return {"after_revision": beat.revision, "epoch": beat.epoch}


def test_every_change_comes_in_order(client: Client) -> None:
    where = start(client)
    with client.watch(**where) as answers:
        client.register("acme/x", make_adapter())
        client.register("acme/x", make_adapter(seed=1))
        client("SetAlias", adapter="acme/x", alias="canary", targets=[{"version": 2}], actor="jane")
        client("DeleteAlias", adapter="acme/x", alias="canary")
        client("DeleteVersion", adapter="acme/x", version=2)
        client("UndeleteVersion", adapter="acme/x", version=2)
        client.register_base_model("twin")
        live = changes(answers, 7)
    kinds = [common_pb2.ChangeKind.Name(change.kind).removeprefix("CHANGE_KIND_") for change in live]
    assert kinds == [
        "VERSION", "VERSION", "ALIAS", "ALIAS_DELETED", "VERSION_DELETED", "VERSION_UNDELETED", "BASE_MODEL"
    ]  # fmt: skip
    assert [change.revision - where["after_revision"] for change in live] == list(range(1, 8))
    assert {change.epoch for change in live} == {where["epoch"]}
    assert {change.adapter for change in live[:6]} == {"acme/x"}
    assert [(change.version, change.alias) for change in live[:3]] == [(1, "stable"), (2, ""), (0, "canary")]
    assert (live[2].actor, live[6].adapter, live[6].base_model) == ("jane", "", "twin")
    with client.watch(**where) as answers:  # one that was away catches up
        assert changes(answers, 7) == live
    with client.watch(live[4].revision, where["epoch"]) as answers:
        assert changes(answers, 2) == live[5:]


def test_nothing_new_is_a_heartbeat(client: Client) -> None:
    where = start(client)
    with client.watch(**where) as answers:
        beat = next(answers)
    assert (beat.heartbeat, beat.reset, beat.revision, beat.epoch) == (
        True, False, where["after_revision"], where["epoch"]
    )  # fmt: skip


@pytest.mark.parametrize("away", [{"epoch": "another"}, {"after_revision": 10**9}])
def test_another_epoch_or_future_lists_again(client: Client, away: dict[str, Any]) -> None:
    where = start(client)
    with client.watch(**where | away) as answers:
        reset = next(answers)
        assert (reset.reset, reset.revision, reset.epoch) == (True, where["after_revision"], where["epoch"])
        client.register("x", make_adapter())
        assert changes(answers, 1)[0].adapter == "default/x"


def test_who_is_too_far_behind_lists_again(client: Client, running: RunningStore) -> None:
    running.store.journal.index._feed_length = 3  # type: ignore[attr-defined]
    where = start(client)
    for seed in range(6):
        client.register("x", make_adapter(seed=seed))
    running.close()  # whoever has seen it all itself need not ask the index
    again = RunningStore(running.data_dir)
    running.__dict__.update(again.__dict__)
    with running.client.watch(**where) as answers:
        reset = next(answers)
    assert (reset.reset, reset.revision, reset.epoch) == (True, where["after_revision"] + 6, where["epoch"])
    with running.client.watch(reset.revision - 3, reset.epoch) as answers:
        assert [change.version for change in changes(answers, 3)] == [4, 5, 6]


def test_changes_of_another_process_come_too(client: Client, running: RunningStore) -> None:
    other = make_store(running.data_dir)
    client.register("x", make_adapter())
    with client.watch(**start(client)) as answers:
        next(answers)
        for number, seed in ((2, 1), (3, 2)):
            client.register("x", make_adapter(seed=seed))
            other.changes.delete_version(other.catalog.adapter(_name("x")).name, number)
        assert [(change.kind, change.version) for change in changes(answers, 4)] == [(1, 2), (4, 2), (1, 3), (4, 3)]
    other.close()


def test_a_replaced_index_resets_who_watches(client: Client, running: RunningStore) -> None:
    client.register("x", make_adapter())
    where = start(client)
    other = make_store(running.data_dir)
    with client.watch(**where) as answers:
        assert next(answers).heartbeat
        other.journal.rebuild()
        reset = changes(answers, 1)[0]
        assert reset.reset
        assert reset.epoch != where["epoch"]
        client.register("x", make_adapter(seed=1))
        assert changes(answers, 1)[0].version == 2
    other.close()


def test_an_index_that_went_back_is_healed(client: Client, running: RunningStore) -> None:
    """As a failover does that loses the last writes: they are applied again, in a new epoch."""
    for seed in range(2):
        client.register("x", make_adapter(seed=seed))
    where = start(client)
    other = make_store(running.data_dir)
    stored = other.journal.index.get("adapters/default/x")
    assert stored is not None
    with client.watch(**where) as answers:
        assert next(answers).heartbeat
        db = other.journal.index._writer  # type: ignore[attr-defined]
        db.executescript(
            "BEGIN IMMEDIATE; DELETE FROM streams WHERE name = 'x'; DELETE FROM documents; DELETE FROM feed;"
            "UPDATE position SET revision = 1; COMMIT"
        )
        reset = changes(answers, 1)[0]
    assert reset.reset
    assert reset.epoch != where["epoch"]
    assert other.journal.index.get("adapters/default/x") == stored
    assert client.resolve("x@2").identity.version == 2
    other.close()


def test_a_hundred_watchers_hear_of_everything(client: Client) -> None:
    where = start(client)
    with contextlib.ExitStack() as stack:
        watchers = [stack.enter_context(client.watch(**where)) for _ in range(100)]
        for seed in range(5):
            client.register("x", make_adapter(seed=seed))
        for answers in watchers:
            assert [change.version for change in changes(answers, 5)] == [1, 2, 3, 4, 5]


def test_a_store_that_stops_ends_its_watches(tmp_path: Path) -> None:
    import grpc

    store = RunningStore(tmp_path / "data")
    with store.client.watch() as answers:
        next(answers)
        store._loop.call_soon_threadsafe(store._stop.set)
        with pytest.raises(grpc.RpcError) as caught:
            changes(answers, 1)
    assert isinstance(from_rpc_error(caught.value), Unavailable)
    store.client.channel.close()
    store._thread.join()


def _name(name: str) -> Any:
    from services.common.references import parse_name

    return parse_name(name)
