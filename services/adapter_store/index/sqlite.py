"""The index in one SQLite file: what is used when nothing else is configured.

Several processes of one machine may share it: SQLite lets one of them write at a time.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from services.adapter_store.index.interface import (
    FEED_LENGTH,
    Change,
    Index,
    IndexWriter,
    Looked,
    Position,
    Stored,
    Totals,
    Write,
)
from services.adapter_store.steps import commit_step
from services.common.errors import ResourceExhausted, Unavailable

_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE position (epoch TEXT NOT NULL, revision INTEGER NOT NULL);
-- name: the last part of the stream; live: versions not deleted
CREATE TABLE streams (
    stream TEXT PRIMARY KEY, name TEXT NOT NULL, seq INTEGER NOT NULL, live INTEGER NOT NULL, state TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX names ON streams (name);
CREATE TABLE documents (stream TEXT, key TEXT, document TEXT NOT NULL, PRIMARY KEY (stream, key));
CREATE TABLE packs (digest TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE feed (revision INTEGER PRIMARY KEY, stream TEXT NOT NULL, change TEXT NOT NULL);
"""
_TABLES = ("streams", "documents", "packs", "feed")
# Another process may write for as long as a rebuild of a large store takes.
_BUSY_SECONDS = 60.0
_SCAN = 1000


class SqliteIndex:
    """The index. Every method blocks on the disk, so servers call them off the event loop; safe in several threads.

    Writes and reads have a connection each: a resolve does not wait for a commit's fsync.
    """

    def __init__(self, path: Path, *, feed_length: int = FEED_LENGTH) -> None:
        """Open or make the index. Raises Unavailable when the file is no index of this version."""
        self._feed_length = feed_length
        self._writer = _connect(path)
        self._reader = _connect(path)
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        with self._write() as db:
            (found,) = db.execute("PRAGMA user_version").fetchone()
            if found not in (0, _SCHEMA_VERSION):
                raise Unavailable(
                    "INDEX_VERSION_UNKNOWN",
                    f"{path} has schema {found}, {_SCHEMA_VERSION} is known here; move it away, and start again: "
                    "it is made anew from the log",
                )
            if found == 0:
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute("INSERT INTO position VALUES (?, 0)", (_new_epoch(),))
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def close(self) -> None:
        for lock, connection in ((self._writing, self._writer), (self._reading, self._reader)):
            with lock:
                connection.close()

    def position(self) -> Position:
        with self._read() as db:
            return _position(db)

    def get(self, stream: str) -> Stored | None:
        with self._read() as db:
            return _get(db, stream)

    def scan(self, prefix: str, after: str, limit: int) -> list[tuple[str, Stored]]:
        with self._read() as db:
            rows = db.execute(
                "SELECT stream, seq, state FROM streams WHERE stream > ? AND stream >= ? AND stream < ? "
                "ORDER BY stream LIMIT ?",
                (after, prefix, prefix + chr(0x10FFFF), limit),
            ).fetchall()
        return [(stream, Stored(seq, state)) for stream, seq, state in rows]

    def seqs(self) -> Iterator[tuple[str, int]]:
        after = ""
        while True:
            with self._read() as db:
                rows = db.execute(
                    "SELECT stream, seq FROM streams WHERE stream > ? ORDER BY stream LIMIT ?", (after, _SCAN)
                ).fetchall()
            if not rows:
                return
            yield from rows
            after = rows[-1][0]

    def documents(self, stream: str, keys: Iterable[str]) -> dict[str, str]:
        with self._read() as db:
            return _documents(db, stream, keys)

    def lookup(self, stream: str, hint: str, wanted: Callable[[Stored], Iterable[str]]) -> Looked | None:
        del hint  # all is near
        with self._read() as db:
            stored = _get(db, stream)
            return None if stored is None else (stored, _documents(db, stream, wanted(stored)))

    def has_pack(self, digest: str) -> bool:
        with self._read() as db:
            return db.execute("SELECT 1 FROM packs WHERE digest = ?", (digest,)).fetchone() is not None

    def named(self, name: str) -> str | None:
        with self._read() as db:
            row = db.execute(
                "SELECT stream FROM streams WHERE name = ? AND stream GLOB 'adapters/*' ORDER BY stream", (name,)
            ).fetchone()
        return None if row is None else str(row[0])

    def totals(self) -> Totals:
        with self._read() as db:
            return Totals(
                *db.execute(
                    "SELECT count(*) FILTER (WHERE live > 0), coalesce(sum(live), 0), "
                    "count(*) FILTER (WHERE stream GLOB 'base_models/*') FROM streams"
                ).fetchone()
            )

    def changes(self, after: int, limit: int) -> list[Change] | None:
        with self._read() as db:
            revision = _position(db).revision
            if after == revision:
                return []
            (oldest,) = db.execute("SELECT min(revision) FROM feed").fetchone()
            if after > revision or oldest is None or after + 1 < oldest:
                return None
            rows = db.execute(
                "SELECT revision, stream, change FROM feed WHERE revision > ? ORDER BY revision LIMIT ?", (after, limit)
            ).fetchall()
        return [Change(*row) for row in rows]

    def apply(self, write: Write) -> int | None:
        with self._write() as db:
            revision = self._apply(db, write)
            commit_step("index.sqlite.written")
        return revision

    def renew(self, epoch: str) -> Position:
        with self._write() as db:
            if _position(db).epoch == epoch:
                db.execute("UPDATE position SET epoch = ?", (_new_epoch(),))
                db.execute("DELETE FROM feed")
            return _position(db)

    def suspect(self) -> bool:
        """A file loses nothing that was synced; an older copy put in its place is found by its revision."""
        return False

    @contextlib.contextmanager
    def healing(self) -> Iterator[Index]:
        yield self

    @contextlib.contextmanager
    def rebuild(self) -> Iterator[IndexWriter]:
        with self._write() as db:
            for table in _TABLES:
                db.execute(f"DELETE FROM {table}")
            db.execute("UPDATE position SET epoch = ?, revision = 0", (_new_epoch(),))
            yield _InTransaction(self, db)
            commit_step("index.sqlite.rebuilt")

    def _apply(self, db: sqlite3.Connection, write: Write) -> int | None:
        row = db.execute("SELECT seq FROM streams WHERE stream = ?", (write.stream,)).fetchone()
        if write.seq != (row[0] if row is not None else 0) + 1:
            return None
        name = write.stream.rpartition("/")[2]
        db.execute(
            "INSERT INTO streams VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET seq = excluded.seq, live = excluded.live, state = excluded.state",
            (write.stream, name, write.seq, write.live, write.state),
        )
        rows = [(write.stream, key, document) for key, document in write.documents.items()]
        db.executemany("INSERT INTO documents VALUES (?, ?, ?)", rows)
        db.executemany("INSERT OR IGNORE INTO packs VALUES (?)", [(digest,) for digest in write.packs])
        (revision,) = db.execute("UPDATE position SET revision = revision + 1 RETURNING revision").fetchone()
        db.execute("INSERT INTO feed VALUES (?, ?, ?)", (revision, write.stream, write.change))
        db.execute("DELETE FROM feed WHERE revision <= ?", (revision - self._feed_length,))
        return int(revision)

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


class _InTransaction:
    """Applies within a transaction that is open: a rebuild's."""

    def __init__(self, index: SqliteIndex, db: sqlite3.Connection) -> None:
        self._index = index
        self._db = db

    def apply(self, write: Write) -> int | None:
        return self._index._apply(self._db, write)


def _position(db: sqlite3.Connection) -> Position:
    return Position(*db.execute("SELECT epoch, revision FROM position").fetchone())


def _get(db: sqlite3.Connection, stream: str) -> Stored | None:
    row = db.execute("SELECT seq, state FROM streams WHERE stream = ?", (stream,)).fetchone()
    return None if row is None else Stored(*row)


def _documents(db: sqlite3.Connection, stream: str, keys: Iterable[str]) -> dict[str, str]:
    found = {}
    for key in keys:
        row = db.execute("SELECT document FROM documents WHERE stream = ? AND key = ?", (stream, key)).fetchone()
        if row is not None:
            found[key] = row[0]
    return found


def _new_epoch() -> str:
    return secrets.token_hex(8)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    try:
        connection.execute(begin)
        yield
        connection.execute("COMMIT")
    except BaseException as error:
        if connection.in_transaction:  # a full disk may have ended it already
            connection.execute("ROLLBACK")
        if isinstance(error, sqlite3.OperationalError):
            raise _away(error) from error
        raise


def _away(error: sqlite3.OperationalError) -> Unavailable | ResourceExhausted:
    if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
        return ResourceExhausted("DISK_FULL", "the disk of the store's index is full; free some space, then try again")
    return Unavailable("INDEX_UNAVAILABLE", f"the index cannot be used now ({error}); try again", retry_after=1.0)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_SECONDS)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode NORMAL may lose the last commits when the machine stops. The log has them, but a Watch client
        # may have been told of their revisions already, so every commit is synced.
        connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise Unavailable("INDEX_UNREADABLE", f"{path} is no SQLite index ({error}); move it away") from error
    return connection
