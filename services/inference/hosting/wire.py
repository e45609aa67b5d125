"""Messages between the two processes: a frame is its length in four bytes, then a pickle.

Both ends are this program, over a socket that only they hold; nothing else can speak on it.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from services.inference.hosting.interface import EngineBuilder

_LENGTH_BYTES = 4
_READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Start:
    """The first frame to the engine's process: what to run there, and from which level its log is written."""

    build: EngineBuilder
    log_level: int


@dataclass(frozen=True, slots=True)
class Started:
    """The first frame back. error: why there is no engine"""

    error: Exception | None = None


def encode(message: object) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


class Decoder:
    """Puts frames together again, however they were cut on the way."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that became whole with `data`."""
        self._data += data
        start = 0
        while len(self._data) - start >= _LENGTH_BYTES:
            begin = start + _LENGTH_BYTES
            end = begin + int.from_bytes(self._data[start:begin], "little")
            if len(self._data) < end:
                break
            yield pickle.loads(self._data[begin:end])
            start = end
        del self._data[:start]


def receive(connection: socket.socket) -> Iterator[Any]:
    """Messages as they come, until the other end closes or its process ends."""
    decoder = Decoder()
    try:
        while data := connection.recv(_READ_BYTES):
            yield from decoder.feed(data)
    except ConnectionError:
        return


def portable(error: Exception) -> Exception:
    """The error or, where a pickle does not carry it there and back, one that says the same."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # whatever a foreign class does when it is pickled
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
