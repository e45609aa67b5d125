"""What is framed and read by hand are the bytes that protobuf writes and reads."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from multilora.adapter_store.v1 import admin_pb2, store_pb2
from services.common.wire import MAX_HEAD_BYTES, Chunk, parse_part, pull_head, serialize_part

REQUESTS = (admin_pb2.RegisterVersionRequest, admin_pb2.ValidateVersionRequest)
FILES = st.text(max_size=200)
DATA = st.binary(max_size=20_000)


@given(FILES, DATA)
@example("adapter_model.safetensors", bytes(1 << 20))
def test_a_chunk_is_protobufs_bytes(file: str, data: bytes) -> None:
    message = serialize_part(Chunk(file, memoryview(data)))
    for request in REQUESTS:
        chunk = request.FromString(message).chunk
        assert (chunk.file, chunk.data) == (file, data)
    part = parse_part(message)
    assert isinstance(part, Chunk)
    assert (part.file, bytes(part.data)) == (file, data)


@given(FILES, DATA)
def test_a_chunk_that_protobuf_wrote_is_read(file: str, data: bytes) -> None:
    for request in REQUESTS:
        message = request(
            chunk=admin_pb2.FileChunk(file=file, data=data)
        ).SerializeToString()  # leaves out what is empty
        part = parse_part(message)
        assert isinstance(part, Chunk)
        assert (part.file, bytes(part.data)) == (file, data)


def test_a_header_is_protobufs_bytes() -> None:
    header = admin_pb2.RegisterVersionHeader(adapter="acme/x", base_model="base", promote=True)
    for request in REQUESTS:
        assert request.FromString(serialize_part(header)).header == header
        assert parse_part(request(header=header).SerializeToString()) == header


def test_a_message_of_neither_is_none() -> None:
    assert parse_part(b"") is None


@given(st.binary(max_size=60) | st.builds(lambda file, data: serialize_part(Chunk(file, data)), FILES, DATA), st.data())
def test_any_bytes_are_read_as_protobuf_reads_them(message: bytes, data: st.DataObject) -> None:
    """Cut short, with fields twice, in another order, unknown: whatever it is."""
    cut = data.draw(st.integers(0, len(message)))
    message = message[cut:] + message[:cut] if data.draw(st.booleans()) else message[:cut]
    try:
        expected = admin_pb2.RegisterVersionRequest.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            parse_part(message)
        return
    part = parse_part(message)
    match expected.WhichOneof("part"):
        case "header":
            assert part == expected.header
        case "chunk":
            assert isinstance(part, Chunk)
            assert (part.file, bytes(part.data)) == (expected.chunk.file, expected.chunk.data)
        case _:
            assert part is None


@given(st.binary(min_size=1, max_size=20_000), st.integers(0, 2**63 - 1))
def test_a_pulls_message_is_what_protobuf_reads(data: bytes, total_size: int) -> None:
    head = pull_head(len(data), total_size)
    assert len(head) <= MAX_HEAD_BYTES
    read = store_pb2.PullAdapterResponse.FromString(head + data)
    assert read == store_pb2.PullAdapterResponse(data=data, total_size=total_size)
