"""Messages whose bytes protobuf would copy two or three times more: framed and read by hand, as their .proto says.

A PullAdapterResponse with data is a head and then the data. An upload's chunk is written in one piece and read where it
lies; what is laid out in another way is left to protobuf.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import grpc
import grpc.aio

from multilora.adapter_store.v1 import admin_pb2, admin_pb2_grpc, store_pb2

ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdapterAdminService"].full_name

# What a client reads and sends at once: a message has its price, and four smaller ones took a twentieth longer.
UPLOAD_CHUNK_BYTES = 1 << 20

MAX_HEAD_BYTES = 32  # the most that comes before a pull's data: two tags and two varints

_BYTES = 2  # the wire type of what has a length
_PULL_DATA = store_pb2.PullAdapterResponse.DATA_FIELD_NUMBER << 3 | _BYTES
_CHUNK = admin_pb2.RegisterVersionRequest.CHUNK_FIELD_NUMBER << 3 | _BYTES
_CHUNK_FILE = admin_pb2.FileChunk.FILE_FIELD_NUMBER << 3 | _BYTES
_CHUNK_DATA = admin_pb2.FileChunk.DATA_FIELD_NUMBER << 3 | _BYTES


class Chunk(NamedTuple):
    """A piece of a file; where it was received, `data` is a view of the message it came in."""

    file: str
    data: bytes | memoryview


# One message of an upload.
UploadPart = admin_pb2.RegisterVersionHeader | Chunk


class AdminStub(admin_pb2_grpc.AdapterAdminServiceStub):
    """The generated stub, but RegisterVersion and ValidateVersion take an iterator of UploadParts."""

    RegisterVersion: Any
    ValidateVersion: Any

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None:
        super().__init__(channel)  # type: ignore[call-arg]  # its types know of __new__ only
        for name, answer in (
            ("RegisterVersion", admin_pb2.RegisterVersionResponse),
            ("ValidateVersion", admin_pb2.ValidateVersionResponse),
        ):
            call = channel.stream_unary(
                f"/{ADMIN_SERVICE}/{name}",
                request_serializer=serialize_part,
                response_deserializer=answer.FromString,
            )
            setattr(self, name, call)


def pull_head(length: int, total_size: int) -> bytes:
    """What a serialised PullAdapterResponse with so much data begins with; the data's bytes end it."""
    return store_pb2.PullAdapterResponse(total_size=total_size).SerializeToString() + _head(_PULL_DATA, length)


def serialize_part(part: UploadPart) -> bytes:
    """A RegisterVersionRequest or a ValidateVersionRequest, which are the same bytes."""
    if not isinstance(part, Chunk):
        return admin_pb2.RegisterVersionRequest(header=part).SerializeToString()
    file = part.file.encode()
    before = _head(_CHUNK_FILE, len(file)) + file + _head(_CHUNK_DATA, len(part.data))
    return b"".join((_head(_CHUNK, len(before) + len(part.data)), before, part.data))


def parse_part(message: bytes) -> UploadPart | None:
    """The inverse; None for a message that holds neither."""
    chunk = _chunk(message)
    if chunk is not None:
        return chunk
    request = admin_pb2.RegisterVersionRequest.FromString(message)
    match request.WhichOneof("part"):
        case "header":
            return request.header
        case "chunk":
            return Chunk(request.chunk.file, request.chunk.data)
    return None


def _head(tag: int, length: int) -> bytes:
    """Tag and length of a field that has one."""
    head = bytearray([tag])
    while length >= 0x80:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head)


def _chunk(message: bytes) -> Chunk | None:
    """A chunk that is a file's name and its data, in this order, and nothing else."""
    begin, end = _field(message, 0, _CHUNK)
    if end != len(message):
        return None
    file_begin, file_end = _field(message, begin, _CHUNK_FILE)
    data_begin, data_end = _field(message, file_end, _CHUNK_DATA)
    if data_end != end:
        return None
    try:
        return Chunk(message[file_begin:file_end].decode(), memoryview(message)[data_begin:data_end])
    except UnicodeDecodeError:
        return None


def _field(message: bytes, at: int, tag: int) -> tuple[int, int]:
    """Where the content of the field at `at` begins and ends; (-1, -1) when it is another, or cut short."""
    if not 0 <= at < len(message) or message[at] != tag:
        return -1, -1
    length = shift = 0
    for begin, byte in enumerate(message[at + 1 : at + 6], start=at + 2):
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            end = begin + length
            return (begin, end) if end <= len(message) else (-1, -1)
    return -1, -1
