"""Weights that go straight into their pack: the same pack, findings and original as those that are staged first."""

from __future__ import annotations

import json
import zlib
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.adapter_store.crc import joined
from services.adapter_store.log.entry import VersionAdded, decode
from services.adapter_store.records import Registered, UploadHeader, Validated
from services.adapter_store.store import AdapterStore
from services.common.profile import profile_from_config
from services.common.references import AdapterName
from tests.adapter_store.conftest import make_store
from tests.adapter_store.uploads import (
    BASE_MODEL,
    MODEL_CONFIG,
    SHAPES,
    WEIGHTS_FILE,
    Adapter,
    Tensor,
    add_module,
    key,
    make_adapter,
)

EMBEDDING = "base_model.model.model.embed_tokens.base_layer.weight"
Modules = list[tuple[int, str]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    store = make_store(tmp_path_factory.mktemp("streaming"))
    store.changes.register_base_model(profile_from_config(BASE_MODEL, json.dumps(MODEL_CONFIG), max_lora_rank=8))
    return store


def registered(store: AdapterStore, adapter: Adapter, name: str, *, staged: bool, piece: int = 1 << 20) -> Registered:
    header = UploadHeader(AdapterName("acme", name), BASE_MODEL)
    upload = store.registration.begin_upload(header)
    for file, data in sorted(adapter.files().items(), reverse=staged):  # weights that come first are staged
        for start in range(0, len(data), piece):
            upload.write(file, data[start : start + piece])
    assert (upload.stream is None) == staged
    return store.registration.register(header, upload)


def validated(store: AdapterStore, adapter: Adapter, *, staged: bool) -> Validated:
    header = UploadHeader(AdapterName("acme", "dry"), BASE_MODEL)
    upload = store.registration.begin_upload(header)
    for file, data in sorted(adapter.files().items(), reverse=staged):
        upload.write(file, data)
    return store.registration.validate(header, upload)


def original(store: AdapterStore, version: Registered, piece: int = 1 << 20) -> bytes:
    found, reader = b"", store.open_file(version.version.adapter, version.version.number, WEIGHTS_FILE)
    with closing(reader):
        while data := reader.read(len(found), piece):
            found += data
        assert len(found) == reader.size
        assert reader.read(reader.size, 1) == b""
    return found


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    modules=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(sorted(SHAPES))), min_size=1, unique=True),
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
    rank=st.integers(1, 8),
    piece=st.integers(1, 5000),
    seed=st.integers(0, 1 << 30),
    order=st.randoms(use_true_random=False),
)
def test_a_stream_gives_the_pack_and_the_original(
    store: AdapterStore, modules: Modules, dtype: str, rank: int, piece: int, seed: int, order: object
) -> None:
    adapter = make_adapter(
        modules=(), layers=(), rank=rank, target_modules=[name.split(".")[-1] for _, name in modules]
    )
    for layer, module in modules:
        add_module(adapter, layer, module, rank=rank, dtype=dtype, seed=seed)
    tensors = list(adapter.tensors.items())
    order.shuffle(tensors)  # type: ignore[attr-defined]
    adapter.tensors = dict(tensors)
    streamed = registered(store, adapter, f"streamed-{seed}-{rank}", staged=False, piece=piece)
    staged = registered(store, adapter, f"staged-{seed}-{rank}", staged=True)
    assert streamed.version.content.weights_header_digest
    assert not staged.version.content.weights_header_digest
    for field in ("content_digest", "pack_digest", "pack_size", "weights_digest", "modules", "parameters"):
        assert getattr(streamed.version.content, field) == getattr(staged.version.content, field)
    assert original(store, streamed, piece) == original(store, staged) == adapter.files()[WEIGHTS_FILE]


def broken(how: str) -> Adapter:
    adapter = make_adapter()
    b = adapter.tensors[key(1, "mlp.down_proj", "B")]
    match how:
        case "values":
            b.data = b"\xff" * len(b.data)
            del adapter.config["r"]
        case "zero":
            for name, tensor in adapter.tensors.items():
                tensor.data = bytes(len(tensor.data)) if "lora_B" in name else tensor.data
        case "short":
            adapter.raw_weights = adapter.files()[WEIGHTS_FILE][:-5]
        case "long":
            adapter.raw_weights = adapter.files()[WEIGHTS_FILE] + b"x"
        case "cut":
            adapter.raw_weights = adapter.files()[WEIGHTS_FILE][:100]
        case "embedding":
            adapter.tensors[EMBEDDING] = Tensor("F32", [32, 16], bytes(32 * 16 * 4))
    return adapter


@pytest.mark.parametrize("how", ["none", "values", "zero", "short", "long", "cut", "embedding"])
def test_a_stream_finds_what_is_found_in_the_whole(store: AdapterStore, how: str) -> None:
    adapter = broken(how)
    assert validated(store, adapter, staged=False) == validated(store, adapter, staged=True)
    assert not list((store.blobs.root / "tmp").iterdir())  # type: ignore[attr-defined]


def test_weights_that_a_pack_does_not_hold_whole_are_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.changes.register_base_model(profile_from_config(BASE_MODEL, json.dumps(MODEL_CONFIG), max_lora_rank=8))
    adapter = broken("embedding")
    header = UploadHeader(AdapterName("acme", "x"), BASE_MODEL)
    upload = store.registration.begin_upload(header)
    for file, data in adapter.files().items():
        upload.write(file, data)
    found = store.registration.register(header, upload)
    assert found.version.content.weights_digest in {blob.digest for blob in store.blobs.list()}
    assert original(store, found) == adapter.files()[WEIGHTS_FILE]
    assert store.verify().problems == []
    store.close()


def test_a_version_is_written_once_and_verified_as_it_was_uploaded(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.changes.register_base_model(profile_from_config(BASE_MODEL, json.dumps(MODEL_CONFIG), max_lora_rank=8))
    content = registered(store, make_adapter(), "x", staged=False).version.content
    kept = {content.config_digest, content.weights_header_digest, content.pack_digest}
    assert {blob.digest for blob in store.blobs.list()} == kept
    assert store.verify().problems == []
    blob = store.blobs.path(content.weights_header_digest)  # type: ignore[attr-defined]
    blob.write_bytes(blob.read_bytes().replace(b"lora_A", b"lora_C"))
    assert len(store.verify().problems) == 2  # of the header, and of the weights
    store.close()


def test_an_entry_from_before_reads_as_it_was_written(store: AdapterStore) -> None:
    staged = registered(store, make_adapter(seed=77), "old", staged=True)
    data = store.journal.entries.read("adapters/acme/old", 1)
    assert data is not None
    assert b"weights_header_digest" not in data
    body = decode(data, "old").body
    assert isinstance(body, VersionAdded)
    assert body.content == store.catalog.version(staged.version.adapter, 1).content


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_are_joined(first: bytes, second: bytes) -> None:
    assert joined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)
