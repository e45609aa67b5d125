"""Log and index together: what a crash, a lost index, an old copy or a second process leaves is healed, or refused."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.adapter_store.log.entry import VersionAdded
from services.adapter_store.log.fold import AdapterState
from services.adapter_store.log.interface import StreamInfo
from services.adapter_store.store import AdapterStore
from services.common.errors import DataLoss, MultiloraError
from services.common.references import AdapterName
from services.common.split import Target
from tests.adapter_store.conftest import make_store
from tests.adapter_store.test_fold import PROFILE, content

NAME = AdapterName("acme", "x")
STREAM = "adapters/acme/x"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    opened = make_store(tmp_path)
    opened.changes.register_base_model(PROFILE)
    yield opened
    opened.close()


def add_version(store: AdapterStore, seed: int, name: AdapterName = NAME) -> int:
    """Register content without bytes: the journal does not look at them."""

    def decide(folded: object) -> VersionAdded | None:
        state = folded.state  # type: ignore[attr-defined]
        if state.with_content(content(seed).content_digest):
            return None
        number = len(state.versions) + 1
        return VersionAdded(number, content(seed), stable=number == 1)

    state = store.journal.commit(f"adapters/{name}", decide, actor="").state
    assert isinstance(state, AdapterState)
    return state.with_content(content(seed).content_digest) or 0


def test_two_processes_give_each_number_once(store: AdapterStore, tmp_path: Path) -> None:
    other = make_store(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda n: add_version((store, other)[n % 2], n // 2), range(40)))
    assert numbers[::2] == numbers[1::2]  # the same content in both, one version
    assert sorted(numbers[::2]) == list(range(1, 21))
    assert len(store.catalog.versions(NAME, include_deleted=True, page_size=0, page_token="")[0]) == 20
    other.close()


def test_an_entry_that_was_not_applied_is_found_at_start(store: AdapterStore, tmp_path: Path) -> None:
    add_version(store, 0)
    before = store.journal.index.position()
    beside = make_store(tmp_path / "beside")
    shutil.copytree(tmp_path / "log", tmp_path / "beside/log", dirs_exist_ok=True)
    assert beside.journal.index.get(STREAM) is None
    beside.heal()
    assert beside.journal.index.get(STREAM) == store.journal.index.get(STREAM)
    assert beside.catalog.version(NAME, 1) == store.catalog.version(NAME, 1)
    assert beside.catalog.base_models() == [PROFILE]
    store.heal()  # nothing to do, so nobody has to list again
    assert store.journal.index.position() == before
    beside.close()


def test_what_is_written_meanwhile_is_nothing_to_heal(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that starts beside a busy one sends nobody's watchers away."""
    add_version(store, 0)
    beside = make_store(tmp_path)
    streams = beside.journal.entries.streams

    def busy() -> Iterator[StreamInfo]:
        add_version(store, 1)
        yield from streams()

    monkeypatch.setattr(beside.journal.entries, "streams", busy)
    epoch = store.journal.index.position().epoch
    assert beside.journal.heal() == 0
    assert beside.journal.index.position().epoch == epoch
    beside.close()


def test_an_old_index_is_caught_up_in_a_new_epoch(store: AdapterStore, tmp_path: Path) -> None:
    add_version(store, 0)
    old = sqlite3.connect(":memory:")
    store.journal.index._writer.backup(old)  # type: ignore[attr-defined]
    epoch = store.journal.index.position().epoch
    add_version(store, 1)
    store.changes.set_alias(NAME, "canary", [Target(2)])
    expected = store.journal.index.get(STREAM)
    old.backup(store.journal.index._writer)  # type: ignore[attr-defined]
    old.close()
    restored = make_store(tmp_path)
    restored.heal()
    assert restored.journal.index.get(STREAM) == expected
    assert restored.journal.index.position().epoch != epoch
    assert add_version(restored, 2) == 3
    restored.close()


def test_an_answer_that_was_lost_is_no_second_version(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    append = store.journal.entries.append
    monkeypatch.setattr(store.journal.entries, "append", lambda *entry: append(*entry) and False)
    assert [add_version(store, seed) for seed in range(3)] == [1, 2, 3]
    assert store.journal.index.get(STREAM) is not None


@pytest.mark.parametrize("lost", ["adapters/acme/x/000000000002.json", "adapters/acme/x"])
def test_a_log_that_lost_its_end_is_refused(store: AdapterStore, tmp_path: Path, lost: str) -> None:
    for seed in range(2):
        add_version(store, seed)
    path = tmp_path / "log" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataLoss, match=STREAM) as caught:
        store.heal()
    assert caught.value.reason == "LOG_BEHIND_INDEX"
    assert store.journal.rebuild() == (2 if "json" in lost else 1)  # on purpose, what is left is gone on from
    store.heal()


def test_a_log_with_a_hole_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    for seed in range(3):
        add_version(store, seed)
    (tmp_path / "log/adapters/acme/x/000000000002.json").unlink()
    for call in (store.heal, store.journal.rebuild):
        with pytest.raises(DataLoss, match="entry 2") as caught:
            call()
        assert caught.value.reason == "LOG_HOLE"
    assert add_version(store, 3) == 4  # what is known is not touched


def test_broken_entries_are_named(store: AdapterStore, tmp_path: Path) -> None:
    add_version(store, 0)
    (tmp_path / "log/adapters/acme/x/000000000002.json").write_bytes(b"{}")
    with pytest.raises(DataLoss, match="acme/x/2"):
        add_version(store, 1)


@pytest.mark.parametrize("seed", range(5))
def test_a_rebuilt_index_says_the_same(store: AdapterStore, seed: int) -> None:
    """Any operations, by any of two stores; then the index is made anew and says the same."""
    chance = random.Random(seed)
    names = [NAME, AdapterName("acme", "y")]
    for _ in range(60):
        name, number = chance.choice(names), chance.randint(1, 6)
        operation = chance.choice(["add", "add", "alias", "unalias", "delete", "undelete"])
        try:
            if operation == "add":
                add_version(store, chance.randint(0, 9), name)
            elif operation == "alias":
                store.changes.set_alias(name, "canary", [Target(number), Target(number + 1)])
            elif operation == "unalias":
                store.changes.delete_alias(name, "canary")
            elif operation == "delete":
                store.changes.delete_version(name, number)
            else:
                store.changes.undelete_version(name, number)
        except MultiloraError:
            continue
    index = store.journal.index
    before = (index.scan("", "", 100), index.totals(), store.catalog.versions(
        NAME, include_deleted=True, page_size=0, page_token=""
    ))  # fmt: skip
    old = index.position()
    assert store.journal.rebuild() == old.revision
    assert before == (index.scan("", "", 100), index.totals(), store.catalog.versions(
        NAME, include_deleted=True, page_size=0, page_token=""
    ))  # fmt: skip
    assert index.position().epoch != old.epoch
    assert not [problem for problem in store.verify().problems if "not there" not in problem]
