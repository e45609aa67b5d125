"""The packed header: it reads back, and damage is an error with a reason, whatever was damaged."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import DataLoss
from services.common.packed import (
    MAGIC,
    RUN_ALIGNMENT,
    PackedHeader,
    PackedLayer,
    PackedModule,
    decode_header,
    encode_header,
)

MODULES = (
    PackedModule("model.layers.0.self_attn.q_proj", 0, 4, 2.0, "float32", 16, 8, 0, 256),
    PackedModule("model.layers.2.mlp.up_proj", 2, 3, 0.5, "bfloat16", 16, 24, 4096, 4224),
)
HEADER = PackedHeader(
    "sha256:" + "0" * 64, "tiny", (PackedLayer(0, 0, 384, "00000000"), PackedLayer(2, 4096, 272, "ffffffff")), MODULES
)
DATA = encode_header(HEADER)
TOTAL = len(DATA) + HEADER.payload_size


def damaged(**fields: Any) -> PackedHeader:
    """HEADER with fields of its first module changed."""
    return replace(HEADER, modules=(replace(MODULES[0], **fields), MODULES[1]))


def test_a_header_reads_back() -> None:
    assert len(DATA) % RUN_ALIGNMENT == 0
    assert decode_header(DATA, TOTAL) == (HEADER, len(DATA))
    assert decode_header(DATA + bytes(100), TOTAL)[0] == HEADER
    assert (HEADER.max_rank, HEADER.payload_size) == (4, 4368)


@pytest.mark.parametrize(
    "header",
    [
        replace(HEADER, modules=()),
        replace(HEADER, layers=HEADER.layers[:1]),
        replace(HEADER, layers=HEADER.layers[::-1]),
        replace(HEADER, layers=(replace(HEADER.layers[0], size=0), HEADER.layers[1])),
        replace(HEADER, layers=(replace(HEADER.layers[0], offset=64), HEADER.layers[1])),
        replace(HEADER, layers=(replace(HEADER.layers[0], size=5000), HEADER.layers[1])),
        replace(HEADER, modules=(MODULES[0], MODULES[0])),
        damaged(layer=1),
        damaged(rank=0),
        damaged(rank=5),
        damaged(rank=1 << 70),
        damaged(dtype="int8"),
        damaged(in_features=0),
        damaged(out_features=-8),
        damaged(a_offset=-64),
        damaged(a_offset=32),
        damaged(b_offset=320),
        damaged(b_offset=4096),
        damaged(rank=True),
        damaged(scale=2),
        damaged(name=7),
    ],
)
def test_damaged_headers_are_refused(header: PackedHeader) -> None:
    data = encode_header(header)
    with pytest.raises(DataLoss, match="PACKED_CORRUPT"):
        decode_header(data, len(data) + HEADER.payload_size)


@pytest.mark.parametrize("scale", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_scales_are_finite(scale: str) -> None:
    body = json.dumps(json.loads(DATA[16:].rstrip(b"\0"))).replace('"scale": 2.0', f'"scale": {scale}').encode()
    data = (MAGIC + struct.pack("<II", 1, len(body)) + body).ljust(RUN_ALIGNMENT, b"\0")
    with pytest.raises(DataLoss, match="PACKED_CORRUPT"):
        decode_header(data, TOTAL)


@pytest.mark.parametrize("total", [0, TOTAL - 1, TOTAL + 1])
def test_a_file_of_another_size_is_refused(total: int) -> None:
    with pytest.raises(DataLoss, match="PACKED_CORRUPT"):
        decode_header(DATA, total)


def test_another_version_is_told() -> None:
    with pytest.raises(DataLoss, match="PACKED_VERSION_UNKNOWN"):
        decode_header(MAGIC + struct.pack("<II", 2, 0) + DATA[16:], TOTAL)


@given(st.binary(max_size=200), st.integers(0, 1 << 40))
def test_any_bytes_are_read_or_refused(data: bytes, total: int) -> None:
    for candidate in (data, MAGIC + struct.pack("<II", 1, len(data)) + data, DATA[: len(data)]):
        with pytest.raises(DataLoss):
            decode_header(candidate, total)


@given(st.integers(0, len(DATA.rstrip(b"\0")) - 1), st.binary(min_size=1, max_size=3))
def test_mutations_are_refused_or_stay_inside_the_file(at: int, data: bytes) -> None:
    mutated = DATA[:at] + data + DATA[at + len(data) :]
    try:
        header, payload = decode_header(mutated, TOTAL)
    except DataLoss:
        return
    for module in header.modules:
        assert 0 <= payload + module.a_offset + module.a_bytes <= TOTAL
        assert 0 <= payload + module.b_offset + module.b_bytes <= TOTAL
