"""A store's four backend combinations on real servers, and what can happen to an index while nobody looks."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from redis import Redis

from services.adapter_store.backends import INDEX_FILE
from services.adapter_store.index.interface import Index
from services.adapter_store.index.redis import RedisIndex
from services.adapter_store.index.redis_config import RedisConfig
from services.adapter_store.index.sqlite import SqliteIndex
from services.adapter_store.store import AdapterStore
from tests.contracts.backends import BACKENDS, Place
from tests.contracts.redis_server import RedisServer
from tests.contracts.s3_server import S3Server
from tests.contracts.store_model import DELETE_GRACE_NS

INDEXES = ("sqlite", "redis")
COMBINATIONS = [f"{blobs}+{index}" for blobs in BACKENDS for index in INDEXES]
# However the clock was moved, what no version needs is old enough to be swept: blobs' ages are by the servers' clocks.
ANY_AGE_SECONDS = -100 * 365 * 24 * 3600.0


class Copies(Protocol):
    """An index as its administrator sees it; SQLite's is closed while `restore` and `wipe` run."""

    def open(self) -> Index: ...

    def copy(self) -> object: ...

    def restore(self, copied: object) -> None: ...

    def wipe(self) -> None: ...


@dataclass
class SqliteCopies:
    path: Path

    def open(self) -> Index:
        return SqliteIndex(self.path)

    def copy(self) -> object:
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            return connection.serialize()

    def restore(self, copied: object) -> None:
        self.wipe()
        assert isinstance(copied, bytes)
        self.path.write_bytes(copied)

    def wipe(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)


@dataclass
class RedisCopies:
    server: RedisServer
    prefix: str = field(default_factory=lambda: f"model-{secrets.token_hex(8)}")

    def open(self) -> Index:
        return RedisIndex(RedisConfig.parse(self.server.url(), self.prefix))

    def copy(self) -> object:
        with self._client() as client:
            return {key: client.dump(key) for key in self._keys(client)}

    def restore(self, copied: object) -> None:
        self.wipe()
        assert isinstance(copied, dict)
        with self._client() as client:
            for key, dumped in copied.items():
                client.restore(key, 0, dumped)

    def wipe(self) -> None:
        with self._client() as client:
            if keys := self._keys(client):
                client.delete(*keys)

    def _keys(self, client: Redis) -> list[bytes]:
        return list(client.scan_iter(match=f"{{{self.prefix}}}:*", count=1000))

    def _client(self) -> Redis:
        return Redis.from_url(self.server.url())


@dataclass
class World:
    """One store's backends, and the processes that have it open: here, objects with connections of their own."""

    place: Place
    index: Copies
    clock: Callable[[], int]
    max_upload_bytes: int = 1 << 20
    stores: list[AdapterStore] = field(default_factory=list)

    def open(self, count: int) -> None:
        assert not self.stores
        for _ in range(count):
            store = AdapterStore(
                self.place.blobs(),
                self.place.log(),
                self.index.open(),
                max_upload_bytes=self.max_upload_bytes,
                delete_grace=DELETE_GRACE_NS / 1e9,
                blob_grace=ANY_AGE_SECONDS,
                clock=self.clock,
            )
            self.stores.append(store)
            store.heal()

    def close(self) -> None:
        for store in self.stores:
            store.journal.index.close()
        self.stores.clear()
        self.place.close()


@dataclass(frozen=True)
class Servers:
    """What worlds of one combination are made on."""

    combination: str
    directory: Path
    s3: S3Server | None
    redis: RedisServer | None

    def world(self, clock: Callable[[], int]) -> World:
        blobs, _, _ = self.combination.partition("+")
        directory = self.directory / secrets.token_hex(8)
        directory.mkdir()
        place = Place(blobs, directory, self.s3, f"model-{secrets.token_hex(8)}")
        index = RedisCopies(self.redis) if self.redis else SqliteCopies(directory / INDEX_FILE)
        return World(place, index, clock)
