"""What every index backend does: one next entry at a time, a revision each, and a feed that says how far it reaches."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from services.adapter_store.index.interface import Index, Position, Stored, Totals, Write
from services.common.errors import NotFound
from tests.contracts import index_racer
from tests.contracts.index_racer import open_at
from tests.contracts.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
FEED = 5
Open = Callable[[], Index]


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    """Where the test's index is, and the prefix of its keys; nothing is left outside of it."""
    if request.param == "sqlite":
        yield [str(tmp_path / "index.sqlite3")]
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    prefix, before = f"test-{secrets.token_hex(8)}", server.keys()
    yield [server.url(), prefix]
    left = server.keys() - before
    assert {key for key in left if not key.startswith(f"{{{prefix}}}:")} == set()
    assert {key for key in left if ":new:" in key or key.endswith(":lease")} == set()


@pytest.fixture
def open_index(place: list[str]) -> Iterator[Open]:
    """Opens one and the same index, as often as it is called: as several processes do."""
    opened: list[Index] = []

    def open_one() -> Index:
        opened.append(open_at(*place, feed_length=FEED))
        return opened[-1]

    yield open_one
    for index in opened:
        index.close()


@pytest.fixture
def index(open_index: Open) -> Index:
    return open_index()


def write(stream: str = "adapters/acme/x", seq: int = 1, live: int = 1) -> Write:
    documents = {str(seq): f"document {seq}", f"{seq}/modules": "[]"}
    return Write(stream, seq, f"state {seq}", f"change {seq}", documents, (f"sha256:{seq}",), live)


def test_a_new_index_is_empty(index: Index) -> None:
    assert index.position() == Position(index.position().epoch, 0)
    assert index.position().epoch
    assert index.get("adapters/acme/x") is None
    assert index.scan("adapters/", "", 10) == list(index.seqs()) == []
    assert (index.documents("adapters/acme/x", ["1"]), index.named("x"), index.has_pack("sha256:1")) == (
        {},
        None,
        False,
    )
    assert index.totals() == Totals(0, 0, 0)
    assert index.changes(0, 10) == []


def test_an_entry_is_applied_once_and_in_turn(index: Index, open_index: Open) -> None:
    assert index.apply(write(seq=2)) is None
    assert index.apply(write()) == 1
    assert index.apply(write()) is None
    assert open_index().apply(write(seq=2)) == 2
    assert index.apply(write(seq=4)) is None
    assert index.get("adapters/acme/x") == Stored(2, "state 2")
    assert index.documents("adapters/acme/x", ["1", "2/modules", "3"]) == {"1": "document 1", "2/modules": "[]"}
    assert (index.has_pack("sha256:1"), index.has_pack("sha256:3")) == (True, False)
    assert index.position().revision == 2


@pytest.mark.parametrize(
    ("hint", "keys"),
    [("stable", ["1", "2"]), ("b", ["3"]), ("3", ["3"]), ("none", []), ("stable", ["3", "4"]), ("%w", ["1"])],
)
def test_a_state_and_its_documents_are_looked_up_at_once(index: Index, hint: str, keys: list[str]) -> None:
    state = '{"versions":[["sha256:3","base",1,null,false]],"aliases":{"b":[[3,1]],"stable":[[1,90],[2,10]]}}'
    for seq in (1, 2, 3):
        index.apply(replace(write(seq=seq), state=state))
    documents = {key: f"document {key}" for key in keys if key != "4"}
    assert index.lookup("adapters/acme/x", hint, lambda _: keys) == (Stored(3, state), documents)
    assert index.lookup("adapters/acme/y", hint, lambda _: keys) is None


def test_what_is_wanted_may_be_refused(index: Index) -> None:
    def refuse(stored: Stored) -> list[str]:
        raise NotFound("VERSION_NOT_FOUND", stored.state)

    index.apply(write())  # its state is no JSON: it is opaque here
    with pytest.raises(NotFound, match="state 1"):
        index.lookup("adapters/acme/x", "stable", refuse)
    assert index.get("adapters/acme/x") == Stored(1, "state 1")


def test_writers_race_and_one_wins(index: Index, open_index: Open) -> None:
    indexes = [index, open_index()]
    for seq in range(1, 11):
        with ThreadPoolExecutor(2) as pool:
            revisions = list(pool.map(lambda each, seq=seq: each.apply(write(seq=seq)), indexes))
        assert sorted(revisions, key=str) == [seq, None]


def test_processes_race_and_one_wins(index: Index, open_index: Open, place: list[str]) -> None:
    command = [sys.executable, "-m", "tests.contracts.index_racer", *place]
    racers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    revisions = [int(line) for racer in racers for line in racer.communicate(timeout=60)[0].split()]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert sorted(revisions) == list(range(1, index_racer.ENTRIES + 1))
    assert index.position().revision == index_racer.ENTRIES
    assert index.totals() == Totals(1, index_racer.ENTRIES, 0)
    assert open_index().get(index_racer.STREAM) == Stored(index_racer.ENTRIES, "{}")


def test_pages_cover_everything_once(index: Index) -> None:
    streams = [f"adapters/tenant-{tenant}/x{n}" for tenant in range(5) for n in range(40)]
    for stream in streams:
        index.apply(write(stream))
    for prefix in ("", "adapters/", "adapters/tenant-0/", "adapters/tenant-3/", "adapters/tenant"):
        found: list[str] = []
        while page := index.scan(prefix, found[-1] if found else "", 7):
            found += [stream for stream, _ in page]
        assert found == sorted(stream for stream in streams if stream.startswith(prefix))


def test_an_index_is_readable_while_it_is_healed(index: Index) -> None:
    index.apply(write())
    assert not index.suspect()
    with index.healing() as readable:
        assert readable.get("adapters/acme/x") == Stored(1, "state 1")
        assert readable.apply(write(seq=2)) == 2
        assert readable.renew(readable.position().epoch) == index.position()
    assert not index.suspect()
    assert index.get("adapters/acme/x") == Stored(2, "state 2")


def test_streams_are_scanned_in_byte_order(index: Index) -> None:
    streams = ["adapters/a-b/x", "adapters/a/x", "adapters/a/y", "adapters/ab/x", "base_models/x"]
    for stream in reversed(streams):
        index.apply(write(stream))
    assert [stream for stream, _ in index.scan("adapters/", "", 10)] == streams[:4]
    assert [stream for stream, _ in index.scan("adapters/", streams[0], 2)] == streams[1:3]
    assert [stream for stream, _ in index.scan("adapters/a/", "", 10)] == streams[1:3]
    assert [stream for stream, _ in index.scan("base_models/", "", 10)] == streams[4:]
    assert dict(index.seqs()) == dict.fromkeys(streams, 1)
    assert (index.named("y"), index.named("a")) == ("adapters/a/y", None)
    assert str(index.named("x")).startswith("adapters/")


def test_totals_count_what_lives(index: Index) -> None:
    index.apply(write("adapters/acme/x", live=1))
    index.apply(write("adapters/acme/x", 2, live=2))
    index.apply(write("adapters/acme/y", live=1))
    index.apply(write("base_models/tiny", live=0))
    assert index.totals() == Totals(2, 3, 1)
    index.apply(write("adapters/acme/y", 2, live=0))
    assert index.totals() == Totals(1, 2, 1)


def test_the_feed_tells_all_or_that_it_cannot(index: Index) -> None:
    for seq in range(1, 9):
        index.apply(write(seq=seq))
    assert index.changes(8, 10) == []
    assert index.changes(9, 10) is None
    assert index.changes(8 - FEED - 1, 10) is None
    changes = index.changes(8 - FEED, 10)
    assert changes is not None
    assert [(change.revision, change.stream, change.change) for change in changes] == [
        (seq, "adapters/acme/x", f"change {seq}") for seq in range(4, 9)
    ]
    assert [change.revision for change in index.changes(5, 2) or []] == [6, 7]


def test_an_epoch_is_renewed_once(index: Index, open_index: Open) -> None:
    index.apply(write())
    old = index.position()
    new = index.renew(old.epoch)
    assert new.epoch != old.epoch
    assert new.revision == old.revision
    assert open_index().renew(old.epoch) == new == index.position()
    assert index.changes(0, 10) is None
    assert index.get("adapters/acme/x") == Stored(1, "state 1")


def test_a_rebuild_replaces_everything_at_once(index: Index, open_index: Open) -> None:
    for seq in (1, 2):
        index.apply(write(seq=seq))
    index.apply(write("adapters/acme/gone"))
    old = index.position()
    reader = open_index()
    with index.rebuild() as writer:
        assert writer.apply(write(seq=2)) is None
        assert writer.apply(write("adapters/acme/new")) == 1
        assert writer.apply(write()) == 2
        assert reader.position() == old
        assert reader.get("adapters/acme/new") is None
    assert reader.position().revision == 2
    assert reader.position().epoch != old.epoch
    assert dict(reader.seqs()) == {"adapters/acme/new": 1, "adapters/acme/x": 1}
    assert reader.documents("adapters/acme/x", ["2"]) == {}
    assert [change.revision for change in reader.changes(0, 10) or []] == [1, 2]
    assert index.apply(write(seq=2)) == 3


def test_a_rebuild_that_fails_changes_nothing(index: Index) -> None:
    index.apply(write())
    before = index.position()
    rebuild = index.rebuild()
    rebuild.__enter__().apply(write("adapters/acme/new"))
    assert not rebuild.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert index.position() == before
    assert dict(index.seqs()) == {"adapters/acme/x": 1}
    assert index.apply(write(seq=2)) == 2
