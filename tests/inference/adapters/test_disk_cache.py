"""Bytes on this node's disk: whole and verified, or not there."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import DataLoss, Unavailable
from services.inference.adapters import disk_cache
from services.inference.adapters.disk_cache import DiskCache
from tests.inference.adapters.packs import digest_of

CONTENTS = [bytes([number]) * 100 for number in range(5)]
DIGESTS = [digest_of(content) for content in CONTENTS]


def files(root: Path) -> set[str]:
    return {file.name for file in root.iterdir()}


def name(digest: str) -> str:
    return digest.removeprefix("sha256:")


def filled(root: Path, count: int, *, max_bytes: int = 10_000) -> DiskCache:
    cache = DiskCache(root, max_bytes)
    for index in range(count):
        cache.write(DIGESTS[index], [CONTENTS[index][:30], CONTENTS[index][30:]])
        os.utime(root / name(DIGESTS[index]), (index, index))  # a clock that ticks between any two writes
    return cache


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 1000)
    assert DIGESTS[0] not in cache
    assert cache.read(DIGESTS[0]) is None
    assert cache.write(DIGESTS[0], iter([CONTENTS[0][:1], b"", CONTENTS[0][1:]])) == CONTENTS[0]
    assert DIGESTS[0] in cache
    assert cache.read(DIGESTS[0]) == CONTENTS[0]
    assert files(tmp_path / "cache") == {name(DIGESTS[0])}


@pytest.mark.parametrize("damage", [b"", b"short", CONTENTS[1], CONTENTS[0] + b"more"])
def test_a_damaged_file_is_removed(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    cache = filled(tmp_path, 1)
    (tmp_path / name(DIGESTS[0])).write_bytes(damage)
    with caplog.at_level(logging.ERROR):
        assert cache.read(DIGESTS[0]) is None
    assert "damaged" in caplog.text
    assert DIGESTS[0] not in cache
    assert files(tmp_path) == set()
    cache.write(DIGESTS[0], [CONTENTS[0]])
    assert cache.read(DIGESTS[0]) == CONTENTS[0]


def test_other_bytes_than_asked_for_leave_nothing(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    with pytest.raises(DataLoss) as caught:
        cache.write(DIGESTS[0], [CONTENTS[1]])
    assert caught.value.reason == "DIGEST_MISMATCH"
    assert DIGESTS[0] in caught.value.message and DIGESTS[1] in caught.value.message
    assert files(tmp_path) == set()
    assert DIGESTS[0] not in cache


def test_a_pull_that_breaks_is_gone_on_with(tmp_path: Path) -> None:
    def pieces(start: int, end: int) -> Iterator[bytes]:
        yield CONTENTS[0][start:end]
        assert len(files(tmp_path)) == 1, "it is written as it comes"
        raise Unavailable("STORE_AWAY", "gone")

    cache = DiskCache(tmp_path, 1000)
    for start, end in [(0, 50), (50, 80)]:
        assert cache.kept(DIGESTS[0]) == start
        with pytest.raises(Unavailable):
            cache.write(DIGESTS[0], pieces(start, end))
        assert cache.read(DIGESTS[0]) is None and DIGESTS[0] not in cache
    assert cache.write(DIGESTS[0], [CONTENTS[0][80:]]) == CONTENTS[0]
    assert files(tmp_path) == {name(DIGESTS[0])}
    assert cache.kept(DIGESTS[0]) == 0


def test_what_is_kept_of_a_pull_can_be_dropped(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"not what it should be"
        raise Unavailable("STORE_AWAY", "gone")

    cache = DiskCache(tmp_path, 1000)
    with pytest.raises(Unavailable):
        cache.write(DIGESTS[0], pieces())
    cache.drop(DIGESTS[0])
    assert files(tmp_path) == set()
    assert cache.write(DIGESTS[0], [CONTENTS[0]]) == CONTENTS[0]


def test_nothing_is_visible_before_it_is_whole(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)

    def pieces() -> Iterator[bytes]:
        yield CONTENTS[0][:50]
        assert DIGESTS[0] not in cache
        assert cache.read(DIGESTS[0]) is None
        yield CONTENTS[0][50:]

    cache.write(DIGESTS[0], pieces())


def test_the_least_recently_used_goes_first_by_bytes(tmp_path: Path) -> None:
    cache = filled(tmp_path, 3, max_bytes=300)
    cache.read(DIGESTS[0])
    cache.write(DIGESTS[3], [CONTENTS[3]])
    assert [digest in cache for digest in DIGESTS] == [True, False, True, True, False]
    assert files(tmp_path) == {name(DIGESTS[index]) for index in (0, 2, 3)}


def test_one_file_larger_than_the_room_stays_alone(tmp_path: Path) -> None:
    cache = filled(tmp_path, 2, max_bytes=250)
    large = b"x" * 1000
    assert cache.write(digest_of(large), [large]) == large
    assert files(tmp_path) == {name(digest_of(large))}


def test_files_and_their_order_of_use_outlive_a_restart(tmp_path: Path) -> None:
    before = filled(tmp_path, 3)
    before.read(DIGESTS[0])
    after = DiskCache(tmp_path, 300)
    assert after.read(DIGESTS[2]) == CONTENTS[2]
    after.write(DIGESTS[3], [CONTENTS[3]])
    assert files(tmp_path) == {name(DIGESTS[index]) for index in (0, 2, 3)}


def test_a_smaller_room_after_a_restart_is_kept(tmp_path: Path) -> None:
    filled(tmp_path, 4)
    DiskCache(tmp_path, 200)
    assert files(tmp_path) == {name(DIGESTS[index]) for index in (2, 3)}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    (tmp_path / "tmp-abc").write_bytes(b"half a pull")
    cache = DiskCache(tmp_path, 1000)
    assert files(tmp_path) == {name(DIGESTS[0])}
    assert DIGESTS[0] in cache


def test_a_file_removed_by_hand_is_not_here(tmp_path: Path) -> None:
    cache = filled(tmp_path, 1)
    (tmp_path / name(DIGESTS[0])).unlink()
    assert cache.read(DIGESTS[0]) is None
    assert DIGESTS[0] not in cache


def test_a_file_evicted_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(tmp_path, 1)

    def digest_after_eviction(data: bytearray) -> str:
        (tmp_path / name(DIGESTS[0])).unlink()
        return digest_of(bytes(data))

    monkeypatch.setattr(disk_cache, "_digest", digest_after_eviction)
    assert cache.read(DIGESTS[0]) == CONTENTS[0]


def test_readers_and_writers_at_once(tmp_path: Path) -> None:
    """Room for two of five files, so that readers meet evictions: they get the bytes, or None, and never an error."""
    cache = DiskCache(tmp_path, 250)
    errors: list[BaseException] = []
    one_writer = [threading.Lock() for _ in CONTENTS]

    def work(first: int) -> None:
        try:
            for turn in range(150):
                index = (first + turn) % 5
                data = cache.read(DIGESTS[index])
                assert data is None or data == CONTENTS[index]
                if data is None:
                    with one_writer[index]:
                        cache.write(DIGESTS[index], [CONTENTS[index]])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[first]) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert not any(file.startswith("tmp-") for file in files(tmp_path))
