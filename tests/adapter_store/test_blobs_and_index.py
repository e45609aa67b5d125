"""What is particular to a disk: names, leftovers, full disks, and SQLite's settings. contracts/ has the rest."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from services.adapter_store.blobs.disk import DiskBlobs
from services.adapter_store.index.sqlite import SqliteIndex
from services.common.errors import DataLoss, NotFound, ResourceExhausted, Unavailable

DATA = b"some bytes" * 1000
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[DiskBlobs]:
    opened = DiskBlobs(tmp_path)
    yield opened
    opened.close()


def files(blobs: DiskBlobs) -> set[str]:
    return {str(path.relative_to(blobs.root)) for path in blobs.root.rglob("*") if path.is_file()} - {
        "lock",
        "sweep.lock",
    }


def test_a_blob_is_committed_under_its_digest(blobs: DiskBlobs) -> None:
    for _ in range(2):  # the second time it exists
        with blobs.create() as partial:
            partial.write(DATA[:5000])
            partial.write(memoryview(DATA)[5000:])
            assert partial.read() == bytes(partial.map()) == DATA
            assert partial.commit() == DIGEST
    hexadecimal = DIGEST.removeprefix("sha256:")
    assert files(blobs) == {f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}"}
    assert blobs.total_bytes() == len(DATA)
    with closing(blobs.open(DIGEST)) as reader:
        assert (reader.size, reader.read(9998, 100)) == (len(DATA), DATA[9998:])


def test_what_is_not_committed_is_gone(blobs: DiskBlobs) -> None:
    with blobs.create() as partial:
        partial.write(DATA)
        assert len(files(blobs)) == 1
    assert files(blobs) == set()
    with pytest.raises(NotFound, match="BLOB_NOT_FOUND"):
        blobs.open(DIGEST)


def test_an_empty_blob_maps(blobs: DiskBlobs) -> None:
    with blobs.create() as partial:
        assert (partial.map(), partial.read()) == (b"", b"")


def test_a_disk_that_lost_bytes_is_noticed(blobs: DiskBlobs) -> None:
    with blobs.create() as partial:
        partial.write(DATA)
        partial.path.write_bytes(DATA[:-1])
        with pytest.raises(DataLoss, match="SHORT_WRITE"):
            partial.commit()
    assert files(blobs) == set()


def test_a_full_disk_is_told(blobs: DiskBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, blobs.create() as partial:
        partial._file.close()
        monkeypatch.setattr(partial, "_file", full)
        with pytest.raises(ResourceExhausted, match="DISK_FULL"):
            partial.write(DATA)
    assert files(blobs) == set()


def test_leftovers_go_when_no_other_process_is_there(blobs: DiskBlobs) -> None:
    leftover = blobs.create()
    leftover.write(DATA)
    beside = DiskBlobs(blobs.root)
    assert leftover.path.exists()
    beside.close()
    blobs.close()
    again = DiskBlobs(blobs.root)
    assert files(again) == set()
    leftover.discard()
    blobs._lock = again._lock  # the fixture closes the one that is open


def test_an_index_of_another_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(Unavailable, match="schema 99"):
        SqliteIndex(path)


def test_the_index_is_synced_at_every_commit(tmp_path: Path) -> None:
    """FULL is 2: a revision that a watcher was told of survives a power cut."""
    index = SqliteIndex(tmp_path / "index.sqlite3")
    for connection in (index._writer, index._reader):
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    index.close()


def test_what_is_read_now_is_what_is_read(tmp_path: Path) -> None:
    blobs = DiskBlobs(tmp_path)
    with blobs.create() as blob:
        blob.write(bytes(range(256)) * 1000)
        blob.sync()
        digest = blob.commit()
    with closing(blobs.open(digest)) as reader:
        for offset, length in ((0, 1000), (255_000, 5000), (256_000, 10), (300_000, 10)):
            buffer = bytearray(length)
            count = reader.read_now(memoryview(buffer), offset)
            assert count is None or buffer[:count] == reader.read(offset, length)
    blobs.close()
