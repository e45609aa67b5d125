"""The contract of blobs/interface.py: every backend passes it, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from services.adapter_store.blobs.interface import Blobs
from services.common.errors import DataLoss, NotFound, ResourceExhausted
from tests.contracts.backends import BACKENDS, MIB, Place, left_behind, place

SMALL = b"some bytes" * 1000
LARGE = random.Random(1).randbytes(12 * MIB + 12345)  # three parts, thirteen ranges
SIZES = {"empty": b"", "small": SMALL, "large": LARGE}


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def path_of(digest: str) -> str:
    hexadecimal = digest.removeprefix("sha256:")
    return f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}"


def commit(blobs: Blobs, data: bytes) -> str:
    with blobs.create() as partial:
        partial.write(data)
        return partial.commit()


def read_all(blobs: Blobs, digest: str, offset: int = 0, length: int = MIB) -> bytes:
    pieces = []
    with closing(blobs.open(digest)) as reader:
        while piece := reader.read(offset, length):
            pieces.append(piece)
            offset += len(piece)
    return b"".join(pieces)


@pytest.fixture(params=BACKENDS)
def here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with place(request.param, tmp_path, request, monkeypatch) as opened:
        yield opened
        assert left_behind(opened, lambda name: name.startswith("blobs/sha256/")) == set()


@pytest.fixture
def blobs(here: Place) -> Blobs:
    return here.blobs()


@pytest.mark.parametrize("size", SIZES)
def test_a_blob_is_committed_under_its_digest(here: Place, blobs: Blobs, size: str) -> None:
    data = SIZES[size]
    with blobs.create() as partial:
        partial.write(data[:5000])
        assert blobs.total_bytes() == 0
        partial.write(memoryview(data)[5000:])
        assert partial.size == len(data)
        assert partial.read() == bytes(partial.map()) == data
        assert partial.commit() == digest_of(data)
        assert here.kept() == {path_of(digest_of(data))}  # the staged file is gone at once
    assert read_all(blobs, digest_of(data)) == data
    assert [(blob.digest, blob.size) for blob in blobs.list()] == [(digest_of(data), len(data))]
    assert blobs.total_bytes() == len(data)


def test_bytes_may_be_written_in_any_order_by_any_thread(blobs: Blobs) -> None:
    data = bytes(4096) + LARGE  # what is written nowhere is zeros
    pieces = [(offset, data[offset : offset + 300_000]) for offset in range(4096, len(data), 300_000)]
    random.Random(4).shuffle(pieces)
    with blobs.create() as partial, ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda piece: partial.write_at(*piece), pieces))
        assert partial.size == len(data)
        assert partial.commit() == digest_of(data)
    assert read_all(blobs, digest_of(data)) == data


def test_the_digest_is_of_the_bytes_as_they_are(blobs: Blobs) -> None:
    with blobs.create() as partial:
        partial.write_at(3, b"def")
        assert partial.digest == digest_of(b"\0\0\0def")
        partial.write_at(0, b"abc")
        assert partial.digest == digest_of(b"abcdef")


def test_what_is_not_committed_is_gone(here: Place, blobs: Blobs) -> None:
    with blobs.create() as partial:
        partial.write(SMALL)
        partial.discard()
    assert here.kept() == set()
    with pytest.raises(NotFound, match="BLOB_NOT_FOUND"):
        blobs.open(digest_of(SMALL))


def test_reads_at_any_offset_are_those_bytes(blobs: Blobs) -> None:
    chance = random.Random(2)
    with closing(blobs.open(commit(blobs, LARGE))) as reader:
        assert reader.size == len(LARGE)
        for _ in range(60):
            offset = chance.randrange(len(LARGE) + 10)
            length = chance.choice([1, 100, MIB - 1, MIB, 3 * MIB + 1])
            assert reader.read(offset, length) == LARGE[offset : offset + length]
        assert reader.read(len(LARGE), 1) == reader.read(len(LARGE) + 5, MIB) == b""


def test_one_reader_serves_several_threads(blobs: Blobs) -> None:
    with closing(blobs.open(commit(blobs, LARGE))) as reader, ThreadPoolExecutor(6) as threads:
        offsets = random.Random(3).sample(range(len(LARGE)), 48)
        for offset, data in zip(offsets, threads.map(lambda start: reader.read(start, 70_000), offsets), strict=True):
            assert data == LARGE[offset : offset + 70_000]


@pytest.mark.parametrize("size", ["small", "large"])
def test_of_eight_racers_all_are_right_and_one_blob_is_there(here: Place, size: str) -> None:
    data = SIZES[size]
    everyone = [here.blobs(), here.blobs()]
    with ThreadPoolExecutor(8) as threads:
        digests = list(threads.map(lambda number: commit(everyone[number % 2], data), range(8)))
    assert set(digests) == {digest_of(data)}
    assert here.kept() == {path_of(digest_of(data))}
    assert read_all(everyone[0], digest_of(data)) == data


def test_a_second_commit_makes_it_young_again(here: Place, blobs: Blobs) -> None:
    digest = commit(blobs, LARGE)
    (first,) = blobs.list()
    here.tick()
    assert commit(blobs, LARGE) == digest
    (second,) = blobs.list()
    assert second.modified_ns > first.modified_ns
    assert read_all(blobs, digest) == LARGE


def test_only_what_is_old_is_removed(here: Place, blobs: Blobs) -> None:
    assert not blobs.delete(digest_of(SMALL), before_ns=time.time_ns())  # not there
    before = time.time_ns()
    digest = commit(blobs, SMALL)
    assert not blobs.delete(digest, before_ns=before)
    here.tick()
    between = time.time_ns()
    commit(blobs, SMALL)
    assert not blobs.delete(digest, before_ns=between)
    assert read_all(blobs, digest) == SMALL
    here.tick()
    assert blobs.delete(digest, before_ns=time.time_ns())
    assert not blobs.delete(digest, before_ns=time.time_ns())
    assert here.kept() == set()
    with pytest.raises(NotFound, match="BLOB_NOT_FOUND"):
        blobs.open(digest)


def test_a_commit_wins_over_a_removal_at_the_same_time(here: Place) -> None:
    mine, collector = here.blobs(), here.blobs()
    for _ in range(3):
        digest = commit(mine, SMALL)
        here.tick()
        before = time.time_ns()
        with ThreadPoolExecutor(6) as threads:
            removals = [threads.submit(collector.delete, digest, before_ns=before) for _ in range(3)]
            commits = [threads.submit(commit, mine, SMALL) for _ in range(3)]
            assert {future.result() for future in commits} == {digest}
            assert sum(future.result() for future in removals) <= 1
        assert read_all(mine, digest) == SMALL
        here.tick()


def test_one_process_sees_what_another_committed(here: Place) -> None:
    first, second = here.blobs(), here.blobs()
    with first.create() as staged:
        staged.write(SMALL)
        third = here.blobs()  # whoever starts meanwhile takes nothing away
        digest = staged.commit()
    assert read_all(second, digest) == read_all(third, digest) == SMALL
    assert commit(second, SMALL) == digest


def test_a_full_disk_is_told(here: Place, blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, blobs.create() as partial:
        partial._file.close()  # type: ignore[attr-defined]
        monkeypatch.setattr(partial, "_file", full)
        with pytest.raises(ResourceExhausted, match="DISK_FULL"):
            partial.write(SMALL)
    assert here.kept() == set()


def test_a_disk_that_lost_bytes_is_noticed(here: Place, blobs: Blobs) -> None:
    with blobs.create() as partial:
        partial.write(SMALL)
        partial.path.write_bytes(SMALL[:-1])  # type: ignore[attr-defined]
        with pytest.raises(DataLoss, match="SHORT_WRITE"):
            partial.commit()
    assert here.kept() == set()


def test_a_reader_is_closed_twice_and_early(blobs: Blobs) -> None:
    reader = blobs.open(commit(blobs, LARGE))
    with closing(reader):
        assert reader.read(0, 10) == LARGE[:10]
