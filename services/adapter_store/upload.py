"""An upload's two files while they arrive: caps and names are enforced as the bytes come in.

The config is staged. So are the weights, unless the config came before them and a look at both says that a pack will
hold every byte: then they go straight into one (streaming.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Self

from services.adapter_store.blobs.interface import Blobs, PartialBlob
from services.adapter_store.findings import Findings, Reason, shown
from services.adapter_store.manifest import MAX_CONFIG_BYTES
from services.adapter_store.safetensors_header import LENGTH, HeaderError, PickleError, header_length
from services.common.errors import Cancelled, InvalidArgument

if TYPE_CHECKING:
    from services.adapter_store.streaming import WeightsStream

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


# From the config and the weights' header, the latter with its length before it; None when they are to be staged.
OpenStream = Callable[[bytes, bytes], "WeightsStream | None"]


class Upload:
    """Both files under temporary names. Leaving the `with` block, or `discard`, removes what was not committed.

    Written to from worker threads; a discard while a write is under way waits for it, and later writes are refused.
    """

    def __init__(self, blobs: Blobs, max_bytes: int, open_stream: OpenStream) -> None:
        self._blobs = blobs
        self._max_bytes = max_bytes
        self._open_stream = open_stream
        self._files: dict[str, PartialBlob] = {}
        self._sizes: dict[str, int] = {}
        self._current: str | None = None
        self._weights_start = bytearray()  # until the header is whole
        self.stream: WeightsStream | None = None  # the weights, when they are not staged
        self._discarded = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.discard()

    @property
    def config(self) -> PartialBlob:
        return self._files[CONFIG_FILE]

    @property
    def weights(self) -> PartialBlob:
        """The staged weights; there is no `stream`."""
        return self._files[WEIGHTS_FILE]

    @property
    def weights_digest(self) -> str:
        return (self.stream or self.weights).digest

    @property
    def weights_size(self) -> int:
        return self._sizes[WEIGHTS_FILE]

    def write(self, file: str, data: bytes | memoryview) -> None:
        """Append to one of the files. Raises InvalidArgument for another name, a file begun anew, or too many bytes."""
        with self._lock:
            if self._discarded:
                raise Cancelled("UPLOAD_ENDED", "the upload has ended")
            self._turn_to(file)
            self.check_sizes(self._sizes | {file: self._sizes[file] + len(data)})
            self._sizes[file] += len(data)
            if file in self._files:
                self._files[file].write(data)
            elif self.stream is not None:
                self.stream.write(data)
            else:
                self._begin_weights(data)

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raise InvalidArgument when files of these sizes would be too many bytes."""
        what, limit = "the upload", self._max_bytes
        if sizes.get(CONFIG_FILE, 0) > MAX_CONFIG_BYTES:
            what, limit = CONFIG_FILE, MAX_CONFIG_BYTES
        elif sum(sizes.values()) <= self._max_bytes:
            return
        raise InvalidArgument(
            "UPLOAD_TOO_LARGE", f"{what} is larger than {limit} bytes, the most accepted", limit=limit
        )

    def check_complete(self) -> None:
        """Both files have come to their ends. Raises InvalidArgument unless they have begun."""
        findings = Findings()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if file not in self._sizes:
                findings.add(Reason.MISSING_FILE, f"{file} is missing; send it too", file=file)
        findings.raise_if_any()
        with self._lock:
            if WEIGHTS_FILE not in self._files and self.stream is None:  # they end within their header
                self._stage_weights()

    def discard(self) -> None:
        with self._lock:
            self._discarded = True
            for blob in self._files.values():
                blob.discard()
            if self.stream is not None:
                self.stream.discard()

    def _turn_to(self, file: str) -> None:
        if file == self._current:
            return
        if file in self._sizes:
            raise InvalidArgument(
                "INTERLEAVED_FILES", f"{file} goes on after {self._current}; send one file after the other"
            )
        check_file_name(file)
        if file == CONFIG_FILE:
            self._files[file] = self._blobs.create()
        self._sizes[file] = 0
        self._current = file

    def _begin_weights(self, data: bytes | memoryview) -> None:
        """Hold bytes until the header is whole, then decide where they go."""
        start = self._weights_start
        start += data
        if len(start) < LENGTH.size:
            return
        end = LENGTH.size + _checked_length(bytes(start[: LENGTH.size]))
        if len(start) < end:
            return
        if CONFIG_FILE in self._files:
            self.stream = self._open_stream(self.config.read(), bytes(start[:end]))
        if self.stream is None:
            self._stage_weights()
        else:
            self._weights_start = bytearray()
            self.stream.write(memoryview(start)[end:])

    def _stage_weights(self) -> None:
        self._files[WEIGHTS_FILE] = self._blobs.create()
        self._files[WEIGHTS_FILE].write(memoryview(self._weights_start))
        self._weights_start = bytearray()


def _checked_length(start: bytes) -> int:
    """The header's, as soon as it is there: a pickle or a giant header need not be received. Raises InvalidArgument."""
    try:
        return header_length(start)
    except HeaderError as error:
        reason = Reason.UNSAFE_FORMAT if isinstance(error, PickleError) else Reason.INVALID_SAFETENSORS
        findings = Findings()
        findings.add(reason, f"{WEIGHTS_FILE}: {error}; save it as safetensors")
        findings.raise_if_any()
        raise


def check_no_pickle(files: Iterable[str]) -> None:
    """Raise InvalidArgument when weights among the files are a pickle; for a place that lacks WEIGHTS_FILE."""
    findings = Findings()
    for file in sorted(files):
        if file.startswith("adapter_model.") and PurePosixPath(file).suffix in UNSAFE_SUFFIXES:
            findings.add(
                Reason.UNSAFE_FORMAT,
                f"{shown(file)} is a pickle, which can run code when it is read; save it as {WEIGHTS_FILE}",
                file=file,
            )
    findings.raise_if_any()


def check_file_name(file: str, *, field: str = "chunk.file") -> None:
    """Raise InvalidArgument, naming `field`, for any file but the two."""
    if file in (CONFIG_FILE, WEIGHTS_FILE):
        return
    if PurePosixPath(file).suffix.lower() in UNSAFE_SUFFIXES:
        raise InvalidArgument(
            Reason.UNSAFE_FORMAT,
            f"{shown(file)} is a pickle, which can run code when it is read; save the adapter as {WEIGHTS_FILE}",
            field=field,
        )
    raise InvalidArgument(
        "UNEXPECTED_FILE", f"{shown(file)} is not taken; {CONFIG_FILE} and {WEIGHTS_FILE} are", field=field
    )
