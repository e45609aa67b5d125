"""An upload's two files while they arrive: caps and names are enforced as the bytes come in."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from types import TracebackType
from typing import Self

from services.adapter_store.blobs.interface import Blobs, PartialBlob
from services.adapter_store.findings import Findings, Reason, shown
from services.adapter_store.manifest import MAX_CONFIG_BYTES
from services.adapter_store.safetensors_header import LENGTH, HeaderError, PickleError, header_length
from services.common.errors import Cancelled, InvalidArgument

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
UNSAFE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


class Upload:
    """Both files under temporary names. Leaving the `with` block, or `discard`, removes what was not committed.

    Written to from worker threads; a discard while a write is under way waits for it, and later writes are refused.
    """

    def __init__(self, blobs: Blobs, max_bytes: int) -> None:
        self._blobs = blobs
        self._max_bytes = max_bytes
        self._files: dict[str, PartialBlob] = {}
        self._current: str | None = None
        self._weights_start = b""
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
        return self._files[WEIGHTS_FILE]

    def write(self, file: str, data: bytes | memoryview) -> None:
        """Append to one of the files. Raises InvalidArgument for another name, a file begun anew, or too many bytes."""
        with self._lock:
            if self._discarded:
                raise Cancelled("UPLOAD_ENDED", "the upload has ended")
            blob = self._blob(file)
            sizes = {name: other.size for name, other in self._files.items()}
            self.check_sizes(sizes | {file: blob.size + len(data)})
            if file == WEIGHTS_FILE:
                self._check_start(data)
            blob.write(data)

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
        """Raise InvalidArgument unless both files have come."""
        findings = Findings()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if file not in self._files:
                findings.add(Reason.MISSING_FILE, f"{file} is missing; send it too", file=file)
        findings.raise_if_any()

    def discard(self) -> None:
        with self._lock:
            self._discarded = True
            for blob in self._files.values():
                blob.discard()

    def _blob(self, file: str) -> PartialBlob:
        if file != self._current:
            if file in self._files:
                raise InvalidArgument(
                    "INTERLEAVED_FILES", f"{file} goes on after {self._current}; send one file after the other"
                )
            check_file_name(file)
            self._files[file] = self._blobs.create()
            self._current = file
        return self._files[file]

    def _check_start(self, data: bytes | memoryview) -> None:
        """Look at the header's length as soon as it is there: a pickle or a giant header need not be received."""
        if len(self._weights_start) == LENGTH.size:
            return
        self._weights_start += data[: LENGTH.size - len(self._weights_start)]
        if len(self._weights_start) < LENGTH.size:
            return
        findings = Findings()
        try:
            header_length(self._weights_start)
        except HeaderError as error:
            reason = Reason.UNSAFE_FORMAT if isinstance(error, PickleError) else Reason.INVALID_SAFETENSORS
            findings.add(reason, f"{WEIGHTS_FILE}: {error}; save it as safetensors")
        findings.raise_if_any()


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
