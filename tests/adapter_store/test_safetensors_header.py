"""The header parser: what the format allows is read, and of anything else it says so and nothing worse."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from services.adapter_store.safetensors_header import (
    MAX_HEADER_BYTES,
    HeaderError,
    PickleError,
    header_length,
    parse_header,
)
from tests.adapter_store.uploads import make_adapter, safetensors_bytes, with_header

VALID = safetensors_bytes(make_adapter().tensors)


def parse(header: Any, payload: bytes = b"") -> dict[str, Any]:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return dict(parse_header(memoryview(with_header(data, payload))))


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_the_library_writes_is_read_as_the_library_reads_it() -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((0, 4), np.float16), "c": np.array(1.0)}
    data = save(arrays, metadata={"format": "pt"})
    entries = parse_header(memoryview(data))
    assert entries.keys() == arrays.keys()
    for name, found in entries.items():
        assert found.shape == arrays[name].shape
        assert data[found.begin : found.end] == arrays[name].tobytes()


def test_entries_come_in_payload_order() -> None:
    header = {"last": entry(offsets=[4, 8]), "first": entry(offsets=[0, 4])}
    assert list(parse(header, bytes(8))) == ["first", "last"]
    assert parse({}) == {}
    assert parse(b'{"__metadata__": {"format": "pt"}}   ') == {}


@pytest.mark.parametrize(
    ("header", "payload", "told"),
    [
        (b"", b"", "start"),
        (b" {}", b"", "start"),
        (b"[]", b"", "start"),
        (b"{", b"", "JSON"),
        (b"{}x", b"", "JSON"),
        (b'{"\xff": 1}', b"", "UTF-8"),
        (b'{"a":' * 300_000, b"", "lists and objects"),
        (b'{"a":' * 50_000, b"", "JSON"),
        (b'{"a":' + b"[" * 300_000, b"", "lists and objects"),
        (b'{"a":1,"a":2}', b"", "'a' is in its header twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4), "'dtype'"),
        ({"__metadata__": []}, b"", "__metadata__"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"a": []}, b"", "'a' must have"),
        ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "'a' must have"),
        ({"a": entry() | {"more": 1}}, bytes(4), "'a' must have"),
        ({"a": entry("F31")}, bytes(4), "unknown dtype 'F31'"),
        ({"a": entry([])}, bytes(4), "unknown dtype"),
        ({"a": entry(shape=4)}, bytes(4), "shape"),
        ({"a": entry(shape=[-1])}, bytes(4), "shape"),
        ({"a": entry(shape=[True])}, bytes(4), "shape"),
        ({"a": entry(shape=[1.0])}, bytes(4), "shape"),
        ({"a": entry(shape=[1] * 9)}, bytes(4), "shape"),
        ({"a": entry(shape=[2**62, 2**62])}, bytes(4), "spans 4 bytes"),
        ({"a": entry(offsets=[0])}, bytes(4), "data_offsets"),
        ({"a": entry(offsets=[4, 0])}, bytes(4), "data_offsets"),
        ({"a": entry(offsets=[-4, 0])}, bytes(4), "data_offsets"),
        ({"a": entry(offsets=[0, 8])}, bytes(8), "spans 8 bytes, but its shape and dtype need 4"),
        ({"a": entry(offsets=[4, 8])}, bytes(8), "gap"),
        ({"a": entry(), "b": entry()}, bytes(4), "overlaps"),
        ({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(offsets=[4, 8])}, bytes(8), "overlaps"),
        ({"a": entry()}, bytes(3), "end at byte"),
        ({"a": entry()}, bytes(5), "end at byte"),
        ({}, b"x", "end at byte"),
    ],
)
def test_what_the_format_forbids_is_refused(header: Any, payload: bytes, told: str) -> None:
    with pytest.raises(HeaderError, match=told.replace("[", r"\[")):
        parse(header, payload)


def test_lengths_are_checked_first() -> None:
    with pytest.raises(HeaderError, match="7 bytes"):
        header_length(bytes(7))
    with pytest.raises(HeaderError, match=str(MAX_HEADER_BYTES)):
        header_length((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    with pytest.raises(HeaderError, match="a file of 100"):
        header_length((93).to_bytes(8, "little"), 100)
    with pytest.raises(PickleError):
        header_length(b"\x80\x04\x95\x10\0\0\0\0")
    # 640 bytes: the first two are those of a pickle of protocol 2
    assert header_length((0x0280).to_bytes(8, "little")) == 0x0280


@given(st.binary(max_size=300))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    for candidate in (data, with_header(data), with_header(b"{" + data)):
        try:
            parse_header(memoryview(candidate))
        except HeaderError:
            continue


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["F32", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"]) | st.text(max_size=4), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.binary(max_size=16))
def test_any_json_is_parsed_or_refused(header: dict[str, Any], payload: bytes) -> None:
    try:
        parse(header, payload)
    except HeaderError:
        return


@given(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=4), st.booleans())
def test_mutations_are_refused_or_tile_the_file(at: int, data: bytes, replace: bool) -> None:
    """What is still accepted after a mutation, the library accepts as well, with the same tensors."""
    mutated = VALID[:at] + data + VALID[at + (len(data) if replace else 0) :]
    try:
        entries = parse_header(memoryview(mutated))
    except HeaderError:
        return
    assert sum(found.end - found.begin for found in entries.values()) == len(mutated) - 8 - header_length(mutated)
    if all(found.dtype == "F32" for found in entries.values()):
        assert load(mutated).keys() == entries.keys()
