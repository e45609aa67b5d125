"""The two owners of what is on disk: a blob is visible whole or not at all, and so is a version."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.adapter_store.blobs.disk import DiskBlobs
from services.adapter_store.index.sqlite import SqliteIndex
from services.adapter_store.records import BoundModule, VersionContent
from services.common.errors import AlreadyExists, DataLoss, NotFound, ResourceExhausted, Unavailable
from services.common.profile import BaseModelProfile, Shape
from services.common.references import AdapterName

DATA = b"some bytes" * 1000
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
ADAPTER = AdapterName("acme", "x")


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[DiskBlobs]:
    opened = DiskBlobs(tmp_path)
    yield opened
    opened.close()


def files(blobs: DiskBlobs) -> set[str]:
    return {str(path.relative_to(blobs.root)) for path in blobs.root.rglob("*") if path.is_file()} - {"lock"}


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
    with blobs.open(DIGEST).closing() as reader:
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


def test_one_owner_per_directory_and_leftovers_go(blobs: DiskBlobs) -> None:
    leftover = blobs.create()
    leftover.write(DATA)
    with pytest.raises(Unavailable, match="DATA_DIR_IN_USE"):
        DiskBlobs(blobs.root)
    assert leftover.path.exists()  # whoever was refused removed nothing
    blobs.close()
    again = DiskBlobs(blobs.root)
    assert files(again) == set()
    leftover.discard()
    blobs._lock = again._lock  # the fixture closes the one that is open


PROFILE = BaseModelProfile("tiny", "LlamaForCausalLM", 1, 8, {"model.layers.0.q": Shape(2, 2)}, ("tiny",))


def content(number: int) -> VersionContent:
    return VersionContent(
        content_digest=f"sha256:{number:064x}",
        config_digest=DIGEST,
        weights_digest=DIGEST,
        pack_digest=DIGEST,
        pack_size=1,
        base_model="tiny",
        max_rank=1,
        parameters=4,
        dtype="float32",
        warnings=("mind",),
        modules=(BoundModule("model.layers.0.q", 1, 0.1),),
    )


@pytest.fixture
def index(tmp_path: Path) -> Iterator[SqliteIndex]:
    opened = SqliteIndex(tmp_path / "index.sqlite3")
    opened.add_base_model(PROFILE)
    yield opened
    opened.close()


def test_what_is_published_reads_back(index: SqliteIndex, tmp_path: Path) -> None:
    published = index.publish(ADAPTER, content(1), promote=False, created_ns=5)
    assert not published.existed
    assert published.version.content == content(1)
    assert index.version(ADAPTER, 1) == published.version == index.find_content(ADAPTER, content(1).content_digest)
    again = SqliteIndex(tmp_path / "index.sqlite3")
    assert again.version(ADAPTER, 1) == published.version
    assert again.base_model("tiny") == PROFILE
    again.close()


def test_a_refused_publication_leaves_no_trace(index: SqliteIndex) -> None:
    with pytest.raises(AlreadyExists, match="NAME_TAKEN"):
        index.publish(AdapterName("acme", "tiny"), content(1), promote=False, created_ns=5)
    with pytest.raises(sqlite3.IntegrityError):  # a base model that is not there
        index.publish(ADAPTER, VersionContent(**content_fields(base_model="gone")), promote=False, created_ns=5)
    with pytest.raises(NotFound, match="ADAPTER_NOT_FOUND"):
        index.adapter(ADAPTER)
    assert index.publish(ADAPTER, content(1), promote=False, created_ns=5).version.number == 1


def content_fields(**changed: object) -> dict[str, object]:
    made = content(1)
    return {name: getattr(made, name) for name in VersionContent.__slots__} | changed


def test_an_index_of_another_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(Unavailable, match="schema 99"):
        SqliteIndex(path)


def test_the_index_is_synced_at_every_commit(index: SqliteIndex) -> None:
    """FULL is 2: a version that was acknowledged survives a power cut."""
    for connection in (index._writer, index._reader):
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
