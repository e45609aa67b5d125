"""The contract of log/interface.py: every backend passes it, and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.adapter_store.log.interface import AdapterLog, StreamInfo
from tests.contracts.backends import BACKENDS, Place, left_behind, place

STREAM = "adapters/acme/x"


@pytest.fixture(params=BACKENDS)
def here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with place(request.param, tmp_path, request, monkeypatch) as opened:
        yield opened
        assert left_behind(opened, lambda name: name.startswith("log/")) == set()


@pytest.fixture
def log(here: Place) -> AdapterLog:
    return here.log()


def test_entries_are_created_once(here: Place, log: AdapterLog) -> None:
    assert log.read(STREAM, 1) is None
    assert log.append(STREAM, 1, b"one")
    assert not log.append(STREAM, 1, b"other")
    assert not log.append(STREAM, 1, b"one")
    assert log.append(STREAM, 2, b"two" * 10_000)
    assert (log.read(STREAM, 1), log.read(STREAM, 2), log.read(STREAM, 3)) == (b"one", b"two" * 10_000, None)
    assert here.kept() == {f"log/{STREAM}/{seq:012d}.json" for seq in (1, 2)}
    assert here.log().read(STREAM, 1) == b"one"


def test_streams_are_told_from_names(log: AdapterLog) -> None:
    assert list(log.streams()) == []
    # names that a sorted listing could mix up, and more entries than a page of it
    lengths = {"adapters/acme/x": 7, "adapters/acme/x.y": 2, "adapters/acme/x-y": 1, "base_models/x": 4}
    for stream, length in lengths.items():
        for seq in range(1, length + 1):
            assert log.append(stream, seq, b"{}")
    assert sorted(log.streams(), key=lambda info: info.stream) == [
        StreamInfo(stream, length, length) for stream, length in sorted(lengths.items())
    ]


def test_missing_entries_show(log: AdapterLog) -> None:
    for seq in (1, 3, 10):
        log.append(STREAM, seq, b"{}")
    assert list(log.streams()) == [StreamInfo(STREAM, 10, 3)]


@pytest.mark.parametrize("same_bytes", [False, True])
def test_of_eight_racers_one_wins(here: Place, same_bytes: bool) -> None:
    logs = [here.log(), here.log()]
    entries = [b"same" if same_bytes else os.urandom(64) for _ in range(8)]
    for seq in (1, 2, 3):
        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(lambda racer: logs[racer % 2].append(STREAM, seq, entries[racer]), range(8)))  # noqa: B023
        assert sum(won) == 1
        assert logs[0].read(STREAM, seq) == logs[1].read(STREAM, seq) == entries[won.index(True)]


def test_entries_are_read_in_parallel(log: AdapterLog) -> None:
    for seq in range(1, 21):
        assert log.append(STREAM, seq, str(seq).encode())
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda seq: log.read(STREAM, seq), range(1, 22))) == [
            *(str(seq).encode() for seq in range(1, 21)),
            None,
        ]
