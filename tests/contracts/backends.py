"""Each backend, opened for the contract suites, with a way to look behind it at what it keeps."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.adapter_store.blobs.disk import DiskBlobs
from services.adapter_store.blobs.interface import Blobs
from services.adapter_store.blobs.s3 import S3Blobs
from services.adapter_store.log.disk import DiskLog
from services.adapter_store.log.interface import AdapterLog
from services.adapter_store.log.s3 import S3Log
from services.adapter_store.s3 import S3Bucket
from services.adapter_store.s3_config import S3Config
from tests.contracts.s3_server import S3Server

MIB = 1 << 20
BACKENDS = ("disk", "s3")
# Of S3's times only whole seconds are known, so older and younger differ by more than one.
TICK = {"disk": 0.02, "s3": 1.1}
PAGE_SIZE = 3


@dataclass
class Place:
    """Where one test's store is. Every `blobs()` and `log()` is as another process would have it."""

    backend: str
    directory: Path
    server: S3Server | None
    prefix: str
    _open: list[Any] = field(default_factory=list)

    def blobs(self) -> Blobs:
        if self.backend == "disk":
            return self._opened(DiskBlobs(self.directory))
        staging = DiskBlobs(self.directory / f"staging-{len(self._open)}")
        return self._opened(S3Blobs(self.bucket(), staging, part_bytes=5 * MIB, range_bytes=MIB))

    def log(self) -> AdapterLog:
        if self.backend == "disk":
            return self._opened(DiskLog(self.directory))
        return self._opened(S3Log(self.bucket(), page_size=PAGE_SIZE))

    def bucket(self, server: S3Server | None = None, **settings: Any) -> S3Bucket:
        server = server or self.server
        assert server is not None
        settings.setdefault("attempts", 3)
        config = S3Config(server.bucket, self.prefix, server.endpoint_url, server.region, **settings)
        return self._opened(S3Bucket(config))

    def kept(self) -> set[str]:
        """Every file or object there is, whole or not, but for locks."""
        found = {
            str(path.relative_to(self.directory))
            for path in self.directory.rglob("*")
            if path.is_file() and path.suffix != ".lock" and path.name != "lock"
        }
        if self.server is not None:
            found |= {key.removeprefix(f"{self.prefix}/") for key in self.server.keys(f"{self.prefix}/")}
            found |= {f"unfinished {key}" for key in self.server.unfinished_uploads(f"{self.prefix}/")}
        return found

    def tick(self) -> None:
        """Let enough time pass for what comes to be younger than what was."""
        time.sleep(TICK[self.backend])

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def _opened(self, opened: Any) -> Any:
        self._open.append(opened)
        return opened


@contextlib.contextmanager
def place(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A place of the test's own; the S3 server is started for those that need it."""
    server = request.getfixturevalue("s3_server") if backend == "s3" else None
    for name, value in (server.environment if server else {}).items():
        monkeypatch.setenv(name, value)
    directory = tmp_path / "place"
    directory.mkdir()
    opened = Place(backend, directory, server, f"test-{secrets.token_hex(8)}")
    try:
        yield opened
    finally:
        opened.close()


def left_behind(place: Place, allowed: Callable[[str], bool]) -> set[str]:
    return {name for name in place.kept() if not allowed(name)}
