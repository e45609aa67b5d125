"""Rows of the SQLite index as records. Every function runs inside its caller's transaction."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict

from services.adapter_store.records import Adapter, BoundModule, Version, VersionContent
from services.common.profile import BaseModelProfile
from services.common.references import AdapterName

# SQLite's largest; a request may ask for a larger number.
MAX_INTEGER = (1 << 63) - 1


def base_model(db: sqlite3.Connection, name: str) -> BaseModelProfile | None:
    row = db.execute("SELECT profile FROM base_models WHERE name = ?", (name,)).fetchone()
    return None if row is None else BaseModelProfile.from_json(row[0])


def adapter(db: sqlite3.Connection, name: AdapterName) -> Adapter | None:
    key = (name.tenant, name.name)
    if db.execute("SELECT 1 FROM adapters WHERE tenant = ? AND name = ?", key).fetchone() is None:
        return None
    aliases = db.execute("SELECT alias, version FROM aliases WHERE tenant = ? AND name = ? ORDER BY alias", key)
    (live,) = db.execute("SELECT count(*) FROM versions WHERE tenant = ? AND name = ? AND NOT deleted", key).fetchone()
    newest = db.execute(
        "SELECT version, base_model, deleted FROM versions WHERE tenant = ? AND name = ? "
        "ORDER BY deleted, version DESC LIMIT 1",
        key,
    ).fetchone()
    number, base, deleted = newest
    return Adapter(name, dict(aliases.fetchall()), 0 if deleted else number, live, base)


def version(db: sqlite3.Connection, name: AdapterName, number: int, *, with_modules: bool) -> Version | None:
    if number > MAX_INTEGER:
        return None
    key = (name.tenant, name.name, number)
    row = db.execute(
        f"SELECT created_ns, deleted, content, {'modules' if with_modules else 'NULL'} FROM versions "
        "WHERE tenant = ? AND name = ? AND version = ?",
        key,
    ).fetchone()
    if row is None:
        return None
    created_ns, deleted, content, modules = row
    fields = json.loads(content)
    fields["warnings"] = tuple(fields["warnings"])
    if modules is not None:
        fields["modules"] = tuple(BoundModule(*module) for module in json.loads(modules))
    aliases = db.execute(
        "SELECT alias FROM aliases WHERE tenant = ? AND name = ? AND version = ? ORDER BY alias", key
    ).fetchall()
    return Version(
        name, number, created_ns, bool(deleted), tuple(alias for (alias,) in aliases), VersionContent(**fields)
    )


def live_number(db: sqlite3.Connection, name: AdapterName, content_digest: str) -> int | None:
    """Number of the version with this content that is not deleted."""
    row = db.execute(
        "SELECT version FROM versions WHERE tenant = ? AND name = ? AND content_digest = ? AND NOT deleted",
        (name.tenant, name.name, content_digest),
    ).fetchone()
    return None if row is None else int(row[0])


def insert_version(
    db: sqlite3.Connection, name: AdapterName, number: int, content: VersionContent, created_ns: int
) -> None:
    fields = asdict(content)
    modules = [list(module.values()) for module in fields.pop("modules")]
    db.execute(
        "INSERT INTO versions (tenant, name, version, content_digest, pack_digest, base_model, content, modules, "
        "created_ns) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            name.tenant,
            name.name,
            number,
            content.content_digest,
            content.pack_digest,
            content.base_model,
            json.dumps(fields),
            json.dumps(modules),
            created_ns,
        ),
    )


def set_alias(db: sqlite3.Connection, name: AdapterName, alias: str, number: int) -> None:
    db.execute(
        "INSERT INTO aliases VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET version = excluded.version",
        (name.tenant, name.name, alias, number),
    )
