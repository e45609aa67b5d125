"""Strict reading of a safetensors header, before any byte of the payload is trusted.

    0      length n of the header, uint64 little-endian
    8      header, n bytes of UTF-8 JSON: {"name": {"dtype": "F32", "shape": [r, in], "data_offsets": [begin, end]}, …}
    8+n    payload; offsets count from here

The tensors tile the payload: no gap, no overlap, nothing after the last. The parser is our own, because
its work is distrust.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

from services.adapter_store.findings import shown

MAX_HEADER_BYTES = 16 << 20
LENGTH = struct.Struct("<Q")
ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
}
# Far above any adapter's; bounds the memory that a header full of brackets could claim.
_MAX_BRACKETS = 1 << 18
_MAX_DIMENSIONS = 8
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class HeaderError(ValueError):
    """The header is not what the format allows; the message says where and how."""


class PickleError(HeaderError):
    """The bytes are a pickle, or a zip of pickles, under a safetensors name."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor. `begin` and `end` are bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_length(start: bytes, total_size: int | None = None) -> int:
    """The header's length from the file's first 8 bytes. Raises HeaderError when cut off, or beyond the cap or file."""
    if len(start) < LENGTH.size:
        raise HeaderError(f"it ends after {len(start)} bytes, within the header's length")
    length = int(LENGTH.unpack_from(start)[0])
    if length > MAX_HEADER_BYTES:
        if start.startswith(_PICKLE_STARTS):
            raise PickleError("it is a pickle or a torch archive, not safetensors")
        raise HeaderError(f"it claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if total_size is not None and LENGTH.size + length > total_size:
        raise HeaderError(f"it claims a header of {length} bytes in a file of {total_size}")
    return length


def parse_header(data: memoryview, *, is_whole: bool = True) -> dict[str, TensorEntry]:
    """Read and check a file's header: its tensors by name, in payload order. Raises HeaderError.

    is_whole: `data` is the whole file; otherwise only its start, and where the tensors end is not checked
    """
    length = header_length(bytes(data[: LENGTH.size]), len(data))
    payload = LENGTH.size + length
    fields = _parse_json(bytes(data[LENGTH.size : payload]))
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("its __metadata__ must map text to text")
    entries = sorted(
        (_entry(name, entry, payload) for name, entry in fields.items()), key=lambda entry: (entry.begin, entry.end)
    )
    end = _check_tiling(entries, payload)
    if is_whole:
        check_size(end, len(data))
    return {entry.name: entry for entry in entries}


def _parse_json(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise HeaderError("its header does not start with '{'")
    if text.count(b"[") + text.count(b"{") > _MAX_BRACKETS:
        raise HeaderError(f"its header holds more than {_MAX_BRACKETS} lists and objects")
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is no UTF-8 JSON ({shown(str(error))})") from error
    if not isinstance(fields, dict):
        raise HeaderError("its header is no JSON object")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise HeaderError(f"key {shown(twice)} is in its header twice")
    return fields


def _entry(name: str, fields: Any, payload: int) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor {shown(name)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise HeaderError(f"tensor {shown(name)} has an unknown dtype {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise HeaderError(f"tensor {shown(name)} has a senseless shape {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"tensor {shown(name)} has senseless data_offsets {shown(offsets)}")
    size = math.prod(shape) * ITEM_SIZES[dtype]
    if offsets[1] - offsets[0] != size:
        raise HeaderError(
            f"tensor {shown(name)} spans {offsets[1] - offsets[0]} bytes, but its shape and dtype need {size}"
        )
    return TensorEntry(name, dtype, tuple(shape), payload + offsets[0], payload + offsets[1])


def _are_sizes(values: Any) -> bool:
    # `type` and not isinstance: True is an int
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def check_size(end: int, total_size: int) -> None:
    """Raise HeaderError unless the file ends where its tensors do."""
    if end != total_size:
        raise HeaderError(f"its tensors end at byte {end}, but it has {total_size} bytes")


def _check_tiling(entries: list[TensorEntry], payload: int) -> int:
    """Where the tensors end."""
    end = payload
    for entry in entries:
        if entry.begin != end:
            how = "overlaps the tensor before it" if entry.begin < end else "leaves a gap before it"
            raise HeaderError(f"tensor {shown(entry.name)} {how}, at byte {entry.begin - payload} of the payload")
        end = entry.end
    return end
