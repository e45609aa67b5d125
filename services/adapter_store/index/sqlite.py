"""Names, versions and aliases in one SQLite file: the index when nothing else is configured.

A version exists from the moment `publish` commits, never before, and its blobs are durable by then.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from services.adapter_store import refusals
from services.adapter_store.index import rows
from services.adapter_store.records import Adapter, Counts, Registered, Version, VersionContent
from services.common.errors import Unavailable
from services.common.profile import BaseModelProfile
from services.common.references import LATEST, STABLE, AdapterName, AdapterReference

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE base_models (name TEXT PRIMARY KEY, profile TEXT NOT NULL) WITHOUT ROWID;
-- last_version: highest number ever given, so that none is given twice
CREATE TABLE adapters (
    tenant TEXT, name TEXT, last_version INTEGER NOT NULL,
    PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
CREATE TABLE versions (
    tenant TEXT, name TEXT, version INTEGER,
    content_digest TEXT NOT NULL, pack_digest TEXT NOT NULL, base_model TEXT NOT NULL,
    content TEXT NOT NULL, modules TEXT NOT NULL,
    created_ns INTEGER NOT NULL, deleted INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant, name, version),
    FOREIGN KEY (tenant, name) REFERENCES adapters, FOREIGN KEY (base_model) REFERENCES base_models
);
CREATE UNIQUE INDEX live_content ON versions (tenant, name, content_digest) WHERE NOT deleted;
CREATE INDEX packs ON versions (pack_digest);
CREATE TABLE aliases (
    tenant TEXT, name TEXT, alias TEXT, version INTEGER NOT NULL,
    PRIMARY KEY (tenant, name, alias),
    FOREIGN KEY (tenant, name, version) REFERENCES versions
) WITHOUT ROWID;
"""


class SqliteIndex:
    """The index. Every method blocks on the disk, so servers call them off the event loop; safe in several threads.

    Writes and reads have a connection each: a resolve does not wait for a commit's fsync.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the index. Raises Unavailable when the file is no index of this version."""
        self._writer = _connect(path)
        self._reader = _connect(path)
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        with self._write() as db:
            (found,) = db.execute("PRAGMA user_version").fetchone()
            if found not in (0, _SCHEMA_VERSION):
                raise Unavailable(
                    "INDEX_VERSION_UNKNOWN", f"{path} has schema {found}, {_SCHEMA_VERSION} is known here"
                )
            if found == 0:
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def close(self) -> None:
        for lock, connection in ((self._writing, self._writer), (self._reading, self._reader)):
            with lock:
                connection.close()

    def add_base_model(self, profile: BaseModelProfile) -> bool:
        """Register a base model; True when the same profile was there. Raises AlreadyExists."""
        with self._write() as db:
            known = rows.base_model(db, profile.name)
            if known is not None:
                old, new = asdict(known), asdict(profile)
                if old != new:
                    raise refusals.base_model_differs(profile.name, [key for key in new if new[key] != old[key]])
                return True
            taken = db.execute("SELECT tenant, name FROM adapters WHERE name = ?", (profile.name,)).fetchone()
            if taken is not None:
                raise refusals.named_like_adapter(profile.name, AdapterName(*taken))
            db.execute("INSERT INTO base_models VALUES (?, ?)", (profile.name, profile.to_json()))
            return False

    def base_model(self, name: str) -> BaseModelProfile | None:
        with self._read() as db:
            return rows.base_model(db, name)

    def base_models(self) -> list[BaseModelProfile]:
        """All, by name."""
        with self._read() as db:
            return [
                BaseModelProfile.from_json(text)
                for (text,) in db.execute("SELECT profile FROM base_models ORDER BY name")
            ]

    def find_content(self, adapter: AdapterName, content_digest: str) -> Version | None:
        """The version of `adapter` with this content, unless deleted."""
        with self._read() as db:
            number = rows.live_number(db, adapter, content_digest)
            return None if number is None else rows.version(db, adapter, number, with_modules=True)

    def publish(self, adapter: AdapterName, content: VersionContent, *, promote: bool, created_ns: int) -> Registered:
        """Make a version exist: number, first `stable`, promotion, in one transaction.

        Content that a live version has is answered with that version. Raises AlreadyExists for a base model's name.
        """
        with self._write() as db:
            if rows.base_model(db, adapter.name) is not None:
                raise refusals.named_like_base_model(adapter)
            number = rows.live_number(db, adapter, content.content_digest)
            existed = number is not None
            if number is None:
                (number,) = db.execute(
                    "INSERT INTO adapters VALUES (?, ?, 1) "
                    "ON CONFLICT DO UPDATE SET last_version = last_version + 1 RETURNING last_version",
                    (adapter.tenant, adapter.name),
                ).fetchone()
                rows.insert_version(db, adapter, number, content, created_ns)
            if promote or (number == 1 and not existed):
                rows.set_alias(db, adapter, STABLE, number)
            version = rows.version(db, adapter, number, with_modules=True)
            assert version is not None
            return Registered(version, existed)

    def resolve(self, reference: AdapterReference) -> Version:
        """The live version a reference means now. Raises NotFound."""
        with self._read() as db:
            adapter = _existing(db, reference.adapter)
            if reference.version is not None:
                number = reference.version
            elif reference.alias == LATEST:
                if not adapter.latest_version:
                    raise refusals.no_versions(adapter.name)
                number = adapter.latest_version
            elif reference.alias in adapter.aliases:
                number = adapter.aliases[reference.alias]
            else:
                raise refusals.alias_not_found(adapter.name, reference.alias, adapter.aliases)
            return _live(db, adapter, number)

    def adapter(self, name: AdapterName) -> Adapter:
        """Raises NotFound."""
        with self._read() as db:
            return _existing(db, name)

    def adapters(self, *, tenant: str, after: AdapterName | None, limit: int) -> list[Adapter]:
        """Up to `limit` adapters by name, those after `after`; of one tenant unless it is empty."""
        start = (after.tenant, after.name) if after is not None else ("", "")
        with self._read() as db:
            found = db.execute(
                "SELECT tenant, name FROM adapters WHERE (tenant, name) > (?, ?) AND (? = '' OR tenant = ?) "
                "ORDER BY tenant, name LIMIT ?",
                (*start, tenant, tenant, limit),
            ).fetchall()
            return [_existing(db, AdapterName(*key)) for key in found]

    def version(self, adapter: AdapterName, number: int) -> Version:
        """One version with its modules, deleted or not. Raises NotFound."""
        with self._read() as db:
            existing = _existing(db, adapter)
            version = rows.version(db, adapter, number, with_modules=True)
            if version is None:
                raise refusals.version_not_found(adapter, number, existing.latest_version)
            return version

    def versions(self, adapter: AdapterName, *, before: int | None, limit: int, include_deleted: bool) -> list[Version]:
        """Up to `limit` versions, newest first, those below number `before`. Raises NotFound."""
        with self._read() as db:
            _existing(db, adapter)
            found = db.execute(
                "SELECT version FROM versions WHERE tenant = ? AND name = ? AND (? IS NULL OR version < ?) "
                "AND (? OR NOT deleted) ORDER BY version DESC LIMIT ?",
                (adapter.tenant, adapter.name, before, before, include_deleted, limit),
            ).fetchall()
            versions = [rows.version(db, adapter, number, with_modules=False) for (number,) in found]
            return [version for version in versions if version is not None]

    def set_alias(self, adapter: AdapterName, alias: str, number: int) -> Adapter:
        """Point an alias at a live version: the adapter as it is then. Raises NotFound."""
        with self._write() as db:
            _live(db, _existing(db, adapter), number)
            rows.set_alias(db, adapter, alias, number)
            return _existing(db, adapter)

    def delete_version(self, adapter: AdapterName, number: int) -> None:
        """Mark a version deleted. Raises NotFound, and FailedPrecondition while an alias points to it."""
        with self._write() as db:
            version = _live(db, _existing(db, adapter), number)
            if version.aliases:
                raise refusals.version_in_use(adapter, number, version.aliases)
            db.execute(
                "UPDATE versions SET deleted = 1 WHERE tenant = ? AND name = ? AND version = ?",
                (adapter.tenant, adapter.name, number),
            )

    def has_pack(self, pack_digest: str) -> bool:
        """Whether a version, deleted or not, has these packed bytes."""
        with self._read() as db:
            return db.execute("SELECT 1 FROM versions WHERE pack_digest = ?", (pack_digest,)).fetchone() is not None

    def counts(self) -> Counts:
        with self._read() as db:
            return Counts(
                *db.execute(
                    "SELECT count(DISTINCT tenant || '/' || name), count(*), (SELECT count(*) FROM base_models) "
                    "FROM versions WHERE NOT deleted"
                ).fetchone()
            )

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its start, so what it reads stays true until it commits."""
        with self._writing, _transaction(self._writer, "BEGIN IMMEDIATE"):
            yield self._writer

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        """One snapshot, however many statements."""
        with self._reading, _transaction(self._reader, "BEGIN"):
            yield self._reader


def _existing(db: sqlite3.Connection, name: AdapterName) -> Adapter:
    adapter = rows.adapter(db, name)
    if adapter is None:
        raise refusals.adapter_not_found(name)
    return adapter


def _live(db: sqlite3.Connection, adapter: Adapter, number: int) -> Version:
    version = rows.version(db, adapter.name, number, with_modules=False)
    if version is None:
        raise refusals.version_not_found(adapter.name, number, adapter.latest_version)
    if version.deleted:
        raise refusals.version_deleted(adapter.name, number)
    return version


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk may have ended it already
            connection.execute("ROLLBACK")
        raise


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode NORMAL may lose the last commits when the machine stops. A version that was acknowledged must
        # still be there, and its number never given again, so every commit is synced.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise Unavailable("INDEX_UNREADABLE", f"{path} is no SQLite index ({error}); move it away") from error
    return connection
