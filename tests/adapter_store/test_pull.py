"""Packed bytes: what they hold, and that any offset goes on where a pull broke off."""

from __future__ import annotations

import hashlib
import os
import zlib

import numpy as np
import pytest

from services.adapter_store import servicer
from services.adapter_store.blobs.interface import BlobReader
from services.common.errors import DataLoss, InvalidArgument, NotFound
from services.common.packed import RUN_ALIGNMENT, TENSOR_ALIGNMENT, decode_header
from tests.adapter_store import uploads
from tests.adapter_store.conftest import Client, RunningStore
from tests.adapter_store.uploads import SHAPES, key, make_adapter

BITS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_packed_bytes_hold_every_value(client: Client, dtype: str, rank: int, layers: tuple[int, ...]) -> None:
    adapter = make_adapter(rank=rank, dtype=dtype, layers=layers, modules=tuple(reversed(SHAPES)), lora_alpha=5)
    version = client.register("x", adapter).version
    data = client.pull(version.identity.pack_digest)
    header, payload = decode_header(data, len(data))
    assert header.content_digest == version.identity.digest
    assert header.base_model == uploads.BASE_MODEL
    assert [module.name for module in header.modules] == [
        f"model.layers.{layer}.{module}" for layer in layers for module in SHAPES
    ]
    for run in header.layers:
        start = payload + run.offset
        assert start % RUN_ALIGNMENT == 0
        assert f"{zlib.crc32(data[start : start + run.size]):08x}" == run.crc32
    for module in header.modules:
        layer, name = module.layer, module.name.split(".", 3)[3]
        assert (module.rank, module.scale, module.dtype) == (rank, 5 / rank, NAMES[dtype])
        for side, offset, size in (("A", module.a_offset, module.a_bytes), ("B", module.b_offset, module.b_bytes)):
            assert offset % TENSOR_ALIGNMENT == 0
            uploaded = adapter.tensors[key(layer, name, side)]
            values = np.frombuffer(uploaded.data, BITS[dtype]).reshape(uploaded.shape)
            rows = values if side == "A" else values.T
            start = payload + offset
            assert data[start : start + size] == np.ascontiguousarray(rows).tobytes()


def test_mixed_dtypes_are_kept_per_module(client: Client) -> None:
    adapter = make_adapter(dtype="BF16")
    uploads.add_module(adapter, 0, "self_attn.q_proj", dtype="F32")
    version = client.register("x", adapter).version
    data = client.pull(version.identity.pack_digest)
    header, _ = decode_header(data, len(data))
    assert [module.dtype for module in header.modules] == ["float32", "bfloat16", "bfloat16", "bfloat16"]
    assert version.dtype == "float32"


def test_pulls_go_on_at_any_offset(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "PULL_CHUNK_BYTES", 1000)
    identity = client.register("x", make_adapter()).version.identity
    data = client.pull(identity.pack_digest)
    assert len(data) == identity.pack_size
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == identity.pack_digest
    for offset in (0, 1, 999, 1000, 4096, len(data) - 1, len(data)):
        parts = client("PullAdapter", digest=identity.pack_digest, offset=offset)
        assert b"".join(part.data for part in parts) == data[offset:]
        assert [part.total_size for part in parts] == [len(data)] + [0] * (len(parts) - 1)


def test_a_blob_that_was_cut_short_is_told(running: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = running.client.register("x", make_adapter()).version.identity
    hexadecimal = identity.pack_digest.removeprefix("sha256:")
    path = running.data_dir / "blobs" / "sha256" / hexadecimal[:2] / hexadecimal
    open_pack = running.store.open_pack

    def open_and_cut(digest: str, offset: int) -> BlobReader:
        reader = open_pack(digest, offset)
        os.truncate(path, identity.pack_size - 100)
        return reader

    monkeypatch.setattr(running.store, "open_pack", open_and_cut)
    with pytest.raises(DataLoss, match=r"100 bytes early.*\[BLOB_CUT_SHORT\]"):
        running.client.pull(identity.pack_digest)


def test_same_content_packs_to_the_same_bytes(client: Client) -> None:
    one = client.register("one", make_adapter()).version.identity
    two = client.register("two", make_adapter()).version.identity
    assert one.pack_digest == two.pack_digest
    assert client.register("one", make_adapter(seed=1)).version.identity.pack_digest != one.pack_digest


def test_deleted_versions_can_still_be_pulled(client: Client) -> None:
    client.register("x", make_adapter())
    identity = client.register("x", make_adapter(seed=1)).version.identity
    client("DeleteVersion", adapter="x", version=2)
    assert len(client.pull(identity.pack_digest)) == identity.pack_size


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:../../index.sqlite3", "md5:" + "0" * 64, "sha256:" + "A" * 64]
)
def test_bad_digests_are_invalid(client: Client, digest: str) -> None:
    with pytest.raises(InvalidArgument, match="INVALID_DIGEST"):
        client.pull(digest)


def test_only_packed_bytes_are_pulled(client: Client) -> None:
    adapter = make_adapter()
    client.register("x", adapter)
    config_digest = hashlib.sha256(adapter.files()[uploads.CONFIG_FILE]).hexdigest()
    for digest in (config_digest, "0" * 64):
        with pytest.raises(NotFound, match="PACK_NOT_FOUND"):
            client.pull(f"sha256:{digest}")


def test_an_offset_beyond_the_end_is_invalid(client: Client) -> None:
    identity = client.register("x", make_adapter()).version.identity
    for offset in (identity.pack_size + 1, 2**64 - 1):
        with pytest.raises(InvalidArgument, match="OFFSET_OUT_OF_RANGE"):
            client.pull(identity.pack_digest, offset)
