"""From deletion to collection, downloads, and the check of everything."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from multilora.adapter_store.v1 import admin_pb2
from services.adapter_store.blobs.disk import DiskBlobs
from services.adapter_store.registration import Registration
from services.common.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from tests.adapter_store import uploads
from tests.adapter_store.conftest import TIMEOUT_SECONDS, Client, RunningStore
from tests.adapter_store.uploads import CONFIG_FILE, WEIGHTS_FILE, Adapter, make_adapter

DAY_NS = 24 * 3600 * 10**9


@pytest.fixture
def offset() -> list[int]:
    """What the store's clock is ahead of ours, in nanoseconds."""
    return [0]


@pytest.fixture
def aged(tmp_path: Path, offset: list[int]) -> Iterator[RunningStore]:
    """A store whose clock a test may move."""
    store = RunningStore(tmp_path / "data", clock=lambda: time.time_ns() + offset[0])
    store.client.register_base_model()
    yield store
    store.close()


def problems(client: Client) -> list[str]:
    return list(client("VerifyIntegrity").problems)


def test_a_deleted_version_comes_back(client: Client) -> None:
    for seed in range(2):
        client.register("x", make_adapter(seed=seed))
    client("DeleteVersion", adapter="x", version=2)
    version = client("UndeleteVersion", adapter="x", version=2).version
    assert (version.identity.version, version.deleted) == (2, False)
    assert client.resolve("x@2").identity == version.identity
    assert client("UndeleteVersion", adapter="x", version=2).version == version
    with pytest.raises(NotFound, match="VERSION_NOT_FOUND"):
        client("UndeleteVersion", adapter="x", version=3)
    client("DeleteVersion", adapter="x", version=2)
    assert client.register("x", make_adapter(seed=1)).version.identity.version == 3
    with pytest.raises(FailedPrecondition, match="version 3") as caught:
        client("UndeleteVersion", adapter="x", version=2)
    assert caught.value.reason == "CONTENT_LIVES"


def test_a_collection_waits_for_the_grace(aged: RunningStore, offset: list[int]) -> None:
    client = aged.client
    client.register("x", make_adapter())
    gone = client.register("x", make_adapter(seed=1)).version
    client("DeleteVersion", adapter="x", version=2)
    offset[0] = 6 * DAY_NS
    assert client("CollectGarbage").versions == []
    assert client.pull(gone.identity.pack_digest)
    offset[0] = 8 * DAY_NS
    before = aged.blob_files()
    thought = client("CollectGarbage", dry_run=True)
    assert aged.blob_files() == before
    done = client("CollectGarbage", actor="janitor")
    assert (list(done.versions), done.blobs, done.bytes) == (["default/x@2"], thought.blobs, thought.bytes)
    assert sorted(done.digests) == sorted(thought.digests)
    assert (
        done.blobs == len(before) - len(aged.blob_files()) == 1
    )  # config and header of the weights are version 1's too
    assert client("CollectGarbage").blobs == 0
    assert client("GetVersion", adapter="x", version=2).version.collected
    with pytest.raises(FailedPrecondition, match="VERSION_COLLECTED"):
        client("UndeleteVersion", adapter="x", version=2)
    with pytest.raises(FailedPrecondition, match="VERSION_COLLECTED"):
        client("DownloadVersion", adapter="x", version=2, file=CONFIG_FILE)
    with pytest.raises(NotFound, match="BLOB_NOT_FOUND"):
        client.pull(gone.identity.pack_digest)
    assert client("GetHistory", adapter="x").entries[0].actor == "janitor"
    assert problems(client) == []
    again = client.register("x", make_adapter(seed=1)).version.identity
    assert (again.version, again.digest) == (3, gone.identity.digest)
    assert client.pull(again.pack_digest)


def test_bytes_that_another_adapter_needs_stay(aged: RunningStore, offset: list[int]) -> None:
    client = aged.client
    for seed in range(2):
        client.register("x", make_adapter(seed=seed))
    kept = client.register("y", make_adapter(seed=1)).version.identity
    client("DeleteVersion", adapter="x", version=2)
    offset[0] = 8 * DAY_NS
    done = client("CollectGarbage")
    assert (list(done.versions), done.blobs) == (["default/x@2"], 0)
    assert client.pull(kept.pack_digest)
    assert problems(client) == []


def test_a_registration_under_way_is_spared(aged: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blobs are committed, its entry is not yet there."""
    committed, go_on = threading.Event(), threading.Event()
    commit = Registration._commit

    def slow(self: Registration, *arguments: Any) -> Any:
        content = commit(self, *arguments)
        committed.set()
        assert go_on.wait(TIMEOUT_SECONDS)
        return content

    monkeypatch.setattr(Registration, "_commit", slow)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(aged.client.register("x", make_adapter())))
    thread.start()
    assert committed.wait(TIMEOUT_SECONDS)
    assert aged.client("CollectGarbage").blobs == 0
    go_on.set()
    thread.join(TIMEOUT_SECONDS)
    assert aged.client.pull(answers[0].version.identity.pack_digest)
    assert problems(aged.client) == []


def test_blobs_committed_again_are_young(tmp_path: Path) -> None:
    blobs = DiskBlobs(tmp_path)
    with blobs.create() as partial:
        partial.write(b"bytes")
        digest = partial.commit()
    os.utime(blobs.path(digest), (1, 1))
    with blobs.create() as partial:
        partial.write(b"bytes")
        partial.commit()
    assert not blobs.delete(digest, before_ns=DAY_NS)
    os.utime(blobs.path(digest), (1, 1))
    assert blobs.delete(digest, before_ns=DAY_NS)
    assert not blobs.delete(digest, before_ns=DAY_NS)
    blobs.close()


def test_nothing_is_swept_while_a_log_has_a_hole(aged: RunningStore, offset: list[int]) -> None:
    for seed in range(3):
        aged.client.register("x", make_adapter(seed=seed))
    before = aged.blob_files()
    (aged.data_dir / "log/adapters/default/x/000000000002.json").unlink()
    offset[0] = 8 * DAY_NS
    with pytest.raises(DataLoss, match="not entry 2") as caught:
        aged.client("CollectGarbage")
    assert caught.value.reason == "LOG_HOLE"
    assert aged.blob_files() == before
    assert any("not entry 2" in problem for problem in problems(aged.client))


def test_nothing_is_swept_while_a_log_is_not_listed(
    aged: RunningStore, offset: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    aged.client.register("x", make_adapter())
    before, streams = aged.blob_files(), aged.store.journal.entries.streams
    offset[0] = 8 * DAY_NS
    monkeypatch.setattr(
        aged.store.journal.entries, "streams", lambda: (info for info in streams() if not info.stream.endswith("/x"))
    )
    with pytest.raises(DataLoss, match="adapters/default/x") as caught:
        aged.client("CollectGarbage")
    assert caught.value.reason == "LOG_INCOMPLETE"
    assert aged.blob_files() == before


def blob_of(running: RunningStore, digest: str) -> Path:
    return next((running.data_dir / "blobs").rglob(digest.removeprefix("sha256:")))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_index(statement: str) -> Callable[[RunningStore, str], None]:
    return lambda running, _: running.store.journal.index._writer.execute(statement) and None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda running, digest: flip(blob_of(running, digest)), "bytes have changed"),
        (lambda running, digest: blob_of(running, digest).unlink(), "is not there"),
        (edit_index("UPDATE streams SET state = replace(state, '[[1,1]]', '[[2,1]]')"), "something else of adapters"),
        (edit_index("UPDATE documents SET document = '{}' WHERE key = '2'"), "version 2"),
        (edit_index("DELETE FROM documents WHERE key = '2'"), "version 2"),
        (edit_index("DELETE FROM streams WHERE stream GLOB 'adapters/*'"), "to entry 0, the log to 2"),
        (edit_index("UPDATE streams SET stream = 'adapters/default/z' WHERE name = 'x'"), "adapters/default/z"),
    ],
)
def test_damage_is_found(running: RunningStore, damage: Callable[[RunningStore, str], None], told: str) -> None:
    for seed in range(2):
        version = running.client.register("x", make_adapter(seed=seed)).version
    answer = running.client("VerifyIntegrity")
    assert (answer.blobs, list(answer.problems), answer.entries) == (4, [], 3)
    damage(running, version.identity.pack_digest)
    found = problems(running.client)
    assert any(told in problem for problem in found), found


def test_original_files_come_back_byte_for_byte(client: Client) -> None:
    adapter = make_adapter(modules=tuple(uploads.SHAPES))
    client.register("x", adapter)
    for file, data in adapter.files().items():
        parts = client("DownloadVersion", adapter="x", version=1, file=file)
        assert b"".join(part.data for part in parts) == data
        assert parts[0].total_size == len(data)
    with pytest.raises(InvalidArgument) as caught:
        client("DownloadVersion", adapter="x", version=1, file="../../secret")
    assert caught.value.field == "file"
    with pytest.raises(NotFound, match="VERSION_NOT_FOUND"):
        client("DownloadVersion", adapter="x", version=2, file=CONFIG_FILE)


def validate(client: Client, adapter: Adapter) -> Any:
    messages = (
        admin_pb2.ValidateVersionRequest.FromString(request.SerializeToString())
        for request in uploads.requests("x", adapter)
    )
    return client("ValidateVersion", messages)


def test_a_dry_run_keeps_nothing(running: RunningStore) -> None:
    answer = validate(running.client, make_adapter())
    assert (list(answer.findings), answer.finding_count) == ([], 0)
    assert (answer.modules[0].name, answer.modules[0].rank) == ("model.layers.0.self_attn.q_proj", 4)
    assert running.blob_files() == set()
    with pytest.raises(NotFound):
        running.client("GetAdapter", adapter="x")
    assert running.client.register("x", make_adapter()).version.identity.digest == answer.digest


def test_a_dry_run_tells_every_finding_as_data(running: RunningStore) -> None:
    adapter = make_adapter(rank=16, bias="all", use_dora=True)
    del adapter.tensors[uploads.key(1, "mlp.down_proj", "B")]
    answer = validate(running.client, adapter)
    reasons = {finding.reason for finding in answer.findings}
    assert reasons == {"ADAPTER_RANK_TOO_HIGH", "UNPAIRED_TENSOR", "UNSUPPORTED_FEATURE"}
    assert answer.finding_count == len(answer.findings) > 4
    unpaired = next(finding for finding in answer.findings if finding.reason == "UNPAIRED_TENSOR")
    assert unpaired.facts["module"] == "model.layers.1.mlp.down_proj"
    assert running.blob_files() == set()


def test_a_dry_run_tells_what_breaks_an_upload_off(running: RunningStore) -> None:
    answer = validate(running.client, Adapter(raw_weights=b"PK\x03\x04" + b"\0" * 100))
    assert [finding.reason for finding in answer.findings] == ["UNSAFE_FORMAT"]
    missing = [uploads.upload_header("x"), uploads.chunk(CONFIG_FILE, b"{}")]
    messages = (admin_pb2.ValidateVersionRequest.FromString(message.SerializeToString()) for message in missing)
    answer = running.client("ValidateVersion", messages)
    assert [finding.reason for finding in answer.findings] == ["MISSING_FILE"]
    assert WEIGHTS_FILE in answer.findings[0].message
    assert running.blob_files() == set()
    assert json.loads(json.dumps(dict(answer.findings[0].facts)))
