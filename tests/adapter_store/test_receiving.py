"""Uploads as they arrive: their order, their caps, and that nothing stays of one that ends early."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc
from services.adapter_store.manifest import MAX_CONFIG_BYTES
from services.adapter_store.upload import Upload
from services.common.errors import InvalidArgument
from tests.adapter_store import uploads
from tests.adapter_store.conftest import MAX_UPLOAD_BYTES, TIMEOUT_SECONDS, Client, RunningStore
from tests.adapter_store.uploads import CONFIG_FILE, WEIGHTS_FILE, chunk, make_adapter, upload_header

HEADER = upload_header("x")
CONFIG, WEIGHTS = make_adapter().files().values()


@pytest.mark.parametrize(
    ("messages", "reason", "told"),
    [
        ([], "MISSING_HEADER", "header"),
        ([admin_pb2.RegisterVersionRequest()], "MISSING_HEADER", "header"),
        ([chunk(CONFIG_FILE, CONFIG)], "MISSING_HEADER", "header"),
        ([HEADER, HEADER], "MISSING_CHUNK", "chunks"),
        ([HEADER], "MISSING_FILE", CONFIG_FILE),
        ([HEADER, chunk(CONFIG_FILE, CONFIG)], "MISSING_FILE", WEIGHTS_FILE),
        ([HEADER, chunk(WEIGHTS_FILE, WEIGHTS)], "MISSING_FILE", CONFIG_FILE),
        ([HEADER, chunk("adapter_model.bin", b"x")], "UNSAFE_FORMAT", "adapter_model.bin"),
        ([HEADER, chunk("a.PT", b"x")], "UNSAFE_FORMAT", "a.PT"),
        ([HEADER, chunk("model.pkl", b"x")], "UNSAFE_FORMAT", "model.pkl"),
        ([HEADER, chunk("README.md", b"x")], "UNEXPECTED_FILE", "README.md"),
        ([HEADER, chunk("../adapter_config.json", b"x")], "UNEXPECTED_FILE", "../adapter_config.json"),
        ([HEADER, chunk("", b"x")], "UNEXPECTED_FILE", CONFIG_FILE),
        (
            [HEADER, chunk(CONFIG_FILE, CONFIG), chunk(WEIGHTS_FILE, WEIGHTS), chunk(CONFIG_FILE, b" ")],
            "INTERLEAVED_FILES",
            CONFIG_FILE,
        ),
        ([HEADER, chunk(CONFIG_FILE, b" " * (MAX_CONFIG_BYTES + 1))], "UPLOAD_TOO_LARGE", str(MAX_CONFIG_BYTES)),
        ([HEADER, *[chunk(WEIGHTS_FILE, WEIGHTS)] * 400], "UPLOAD_TOO_LARGE", str(MAX_UPLOAD_BYTES)),
        (
            [HEADER, chunk(WEIGHTS_FILE, b"\1\0\0\1\0"), chunk(WEIGHTS_FILE, b"\0\0\0")],
            "INVALID_SAFETENSORS",
            "16777217",
        ),
    ],
)
def test_bad_streams_leave_nothing(running: RunningStore, messages: list[Any], reason: str, told: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        running.client("RegisterVersion", iter(messages))
    assert caught.value.reason == reason
    assert told in caught.value.message
    assert running.blob_files() == set()


def test_a_refusal_does_not_wait_for_another_message(running: RunningStore) -> None:
    told = threading.Event()

    def messages() -> Iterator[admin_pb2.RegisterVersionRequest]:
        yield from (HEADER, chunk("model.pkl", b"x"))
        told.wait(TIMEOUT_SECONDS)

    try:
        with pytest.raises(InvalidArgument, match="UNSAFE_FORMAT"):
            running.client("RegisterVersion", messages())
    finally:
        told.set()
    assert running.blob_files() == set()


def test_files_come_in_any_order_and_any_pieces(client: Client) -> None:
    pieces = [chunk(WEIGHTS_FILE, WEIGHTS[at : at + 7]) for at in range(0, len(WEIGHTS), 7)]
    messages = [HEADER, *pieces, chunk(WEIGHTS_FILE, b""), chunk(CONFIG_FILE, CONFIG)]
    answer = client("RegisterVersion", iter(messages))
    assert client.register("x", make_adapter()).version == answer.version


def test_a_stream_that_breaks_leaves_nothing(running: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    written, discarded = threading.Event(), threading.Event()
    write, discard = Upload.write, Upload.discard

    def write_and_tell(upload: Upload, file: str, data: bytes) -> None:
        write(upload, file, data)
        if file == WEIGHTS_FILE:
            written.set()

    def discard_and_tell(upload: Upload) -> None:
        discard(upload)
        discarded.set()

    def messages() -> Iterator[admin_pb2.RegisterVersionRequest]:
        yield from (HEADER, chunk(CONFIG_FILE, CONFIG), chunk(WEIGHTS_FILE, WEIGHTS[:-100]))
        discarded.wait(TIMEOUT_SECONDS)

    monkeypatch.setattr(Upload, "write", write_and_tell)
    monkeypatch.setattr(Upload, "discard", discard_and_tell)
    stub = admin_pb2_grpc.AdapterAdminServiceStub(running.client.channel)
    call = stub.RegisterVersion.future(messages(), timeout=TIMEOUT_SECONDS)
    assert written.wait(TIMEOUT_SECONDS)
    assert len(running.blob_files()) == 2
    call.cancel()
    assert discarded.wait(TIMEOUT_SECONDS)
    assert running.blob_files() == set()


def test_concurrent_uploads_of_one_content_make_one_version(client: Client) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: client.register("x", make_adapter()), range(12)))
    assert sorted(answer.existed for answer in answers) == [False] + [True] * 11
    assert {answer.version.identity.version for answer in answers} == {1}


def test_concurrent_uploads_of_different_contents_get_a_number_each(client: Client) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda seed: client.register("x", make_adapter(seed=seed)), range(12)))
    assert sorted(answer.version.identity.version for answer in answers) == list(range(1, 13))
    assert len(client("ListVersions", adapter="x").versions) == 12
    assert client.resolve("x").identity.version == 1


def test_nothing_temporary_stays_of_a_success(running: RunningStore) -> None:
    running.client.register("x", make_adapter())
    files = running.blob_files()
    assert len(files) == 3
    assert all(file.startswith("blobs/sha256/") for file in files)
    running.client.register("x", make_adapter())
    assert running.blob_files() == files
    assert uploads.CONFIG_FILE not in str(files)
