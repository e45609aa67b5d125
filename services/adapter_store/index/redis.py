"""The index in Redis: several processes, on any machines, share it.

    {<prefix>}:meta        hash     schema, epoch, revision, incarnation
    {<prefix>}:states      hash     stream → `<seq> <state>`
    {<prefix>}:seqs        hash     stream → `<seq> <live>`
    {<prefix>}:names       zset     streams, bytewise
    {<prefix>}:named       zset     `<name>/<stream>` of adapters, bytewise
    {<prefix>}:documents   hash     `<stream>/<key>` → document
    {<prefix>}:packs       set      pack digests
    {<prefix>}:feed        stream   entry `<revision>-0`: stream, change
    {<prefix>}:totals      hash     adapters, versions, base_models
    {<prefix>}:lease       string   who rebuilds; expires
    {<prefix>}:new:<token>:…        what a rebuild writes; expires

The braces make one slot of them in a cluster. Every write is one script (lua/), handed all keys it touches.
A user of its own needs `~{<prefix>}:*` and the commands that tests/contracts/redis_server.py lists.

Redis may lose what it confirmed: a crash, a failover, a FLUSHALL. Then this index is suspect, and what serves names
gets Unavailable instead of an old answer, until `healing` compared it with the log:

    another run of the server     told by every new connection (redis_server.py)
    another incarnation           an id made with the meta; renewals and rebuilds keep it; without meta, both are made

Each process finds out, and compares, for itself. It believes what it meets when it opens the index: a store heals then.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
from services.adapter_store.index.redis_config import RedisConfig
from services.adapter_store.index.redis_rebuild import (
    LEASE_SECONDS,
    POLL_SECONDS,
    Lease,
    interrupted,
    rebuilding,
    replacing,
    suspicious,
)
from services.adapter_store.index.redis_server import RedisServer, new_id
from services.adapter_store.steps import commit_step
from services.adapter_store.streams import ADAPTERS
from services.common.errors import Unavailable

_SCHEMA = "1"
_META = ("schema", "epoch", "revision", "incarnation")
_KEPT = ("meta", "states", "seqs", "names", "named", "documents", "packs", "feed", "totals")
_SCAN = 1000


@dataclass(frozen=True, slots=True)
class _Meta:
    position: Position
    incarnation: str


@dataclass(slots=True)
class _Trust:
    """The incarnation and run that this process compared with the log, and the incarnation it saw last."""

    believed: tuple[str, int] = ("", 0)
    seen: str = ""


class RedisIndex:
    """The index. Every method blocks on the network, so servers call them off the event loop; safe in threads."""

    def __init__(
        self, config: RedisConfig, *, feed_length: int = FEED_LENGTH, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        """Raises Unavailable when Redis is away or has an index of another version, FailedPrecondition."""
        self._server = RedisServer(config)
        self._feed_length = feed_length
        self._base = f"{{{config.prefix}}}"
        self._keys = [f"{self._base}:{name}" for name in _KEPT]
        (
            self._meta_key,
            self._states,
            self._seqs,
            self._names,
            self._named,
            self._documents,
            self._packs,
            self._feed,
            self._totals,
        ) = self._keys
        self._lease = Lease(f"{self._base}:lease", lease_seconds)
        self._trust = _Trust()
        self._guarded = True
        try:
            self._server.check()
            self._trust.believed = self._look().incarnation, self._server.runs
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._server.close()

    def position(self) -> Position:
        return self._look().position

    def suspect(self) -> bool:
        return self._trust.believed != (self._trust.seen, self._server.runs)

    @contextlib.contextmanager
    def healing(self) -> Iterator[Index]:
        before, runs = self._look(), self._server.runs
        unguarded = copy.copy(self)
        unguarded._guarded = False
        yield unguarded
        self._trust.believed = before.incarnation, runs

    def get(self, stream: str) -> Stored | None:
        return _stored(self._read("HGET", self._states, stream))

    def scan(self, prefix: str, after: str, limit: int) -> list[tuple[str, Stored]]:
        first, last = prefix.encode(), after.encode()
        low = b"(" + last if last >= first and last else b"[" + first if first else b"-"
        high = b"(" + first + b"\xff" if first else b"+"  # no UTF-8 has this byte
        meta, *rows = self._server.script("scan", [self._meta_key, self._names, self._states], low, high, limit)
        self._guard(meta)
        page = []
        for stream, text in zip(rows[::2], rows[1::2], strict=True):
            stored = _stored(text)
            assert stored is not None, f"{stream} is named, but has no state"
            page.append((stream, stored))
        return page

    def seqs(self) -> Iterator[tuple[str, int]]:
        cursor = 0
        while True:
            cursor, page = self._read("HSCAN", self._seqs, cursor, "COUNT", _SCAN)
            for stream, text in page.items():
                yield stream, int(text.partition(" ")[0])
            if not int(cursor):
                return

    def documents(self, stream: str, keys: Iterable[str]) -> dict[str, str]:
        wanted = list(keys)
        if not wanted:
            return {}
        found = self._read("HMGET", self._documents, *(f"{stream}/{key}" for key in wanted))
        return {key: document for key, document in zip(wanted, found, strict=True) if document is not None}

    def lookup(self, stream: str, hint: str, wanted: Callable[[Stored], Iterable[str]]) -> Looked | None:
        keys = [self._meta_key, self._states, self._documents]
        meta, state, *rows = self._server.script("lookup", keys, stream, hint)
        self._guard(meta)
        if (stored := _stored(state)) is None:
            return None
        guessed = dict(zip(rows[::2], rows[1::2], strict=True))
        needed = list(wanted(stored))
        found = {key: guessed[key] for key in needed if key in guessed}
        return stored, found | self.documents(stream, (key for key in needed if key not in guessed))

    def has_pack(self, digest: str) -> bool:
        return bool(self._read("SISMEMBER", self._packs, digest))

    def named(self, name: str) -> str | None:
        start = f"{name}/{ADAPTERS}".encode()
        found = self._read("ZRANGEBYLEX", self._named, b"[" + start, b"(" + start + b"\xff", "LIMIT", 0, 1)
        return found[0].partition("/")[2] if found else None

    def totals(self) -> Totals:
        counts = self._read("HMGET", self._totals, "adapters", "versions", "base_models")
        return Totals(*(int(count or 0) for count in counts))

    def changes(self, after: int, limit: int) -> list[Change] | None:
        meta, first, rows = self._server.pipeline(
            ("HMGET", self._meta_key, *_META),
            ("XRANGE", self._feed, "-", "+", "COUNT", 1),
            ("XRANGE", self._feed, f"({after}-0", "+", "COUNT", limit),
            atomic=True,
        )
        revision = int(meta[2] or 0)
        if after == revision:
            return []
        if after > revision or not first or after + 1 < _revision(first[0][0]):
            return None
        return [Change(_revision(key), fields["stream"], fields["change"]) for key, fields in rows]

    def apply(self, write: Write) -> int | None:
        deadline = time.monotonic() + self._lease.seconds
        while (answer := self._apply(write, self._keys)) == "rebuilding":
            if time.monotonic() > deadline:
                raise rebuilding(self._server.config)
            time.sleep(POLL_SECONDS)
        commit_step("index.redis.written")
        revision: int | None = answer
        return revision

    def renew(self, epoch: str) -> Position:
        self._server.script("renew", [self._meta_key, self._feed], epoch, new_id())
        return self.position()

    @contextlib.contextmanager
    def rebuild(self) -> Iterator[IndexWriter]:
        before, runs = self._look(), self._server.runs
        meta: dict[str, str | int] = dict(zip(_META, (_SCHEMA, new_id(), 0, before.incarnation), strict=True))
        with replacing(self._server, self._base, self._keys, self._lease, meta) as (keys, token):
            yield _Rebuild(self, keys, token)
        self._trust.believed = before.incarnation, runs

    def _apply(self, write: Write, keys: list[str], token: str = "") -> Any:
        """The revision, None, or `rebuilding`."""
        is_adapter = write.stream.startswith(ADAPTERS)
        answer = self._server.script(
            "apply",
            [*keys, self._lease.key],
            *(_SCHEMA, token, self._lease.ms, self._feed_length),
            *(write.stream, write.stream.rpartition("/")[2] if is_adapter else "", write.seq, write.live),
            *(write.state, write.change),
            *(len(write.documents), *(word for pair in write.documents.items() for word in pair)),
            *write.packs,
        )
        if answer == "schema":
            self._look()
        elif answer == "lost":
            self._look()
            raise suspicious(self._server.config)
        elif answer == "expired":
            raise interrupted(self._server.config, self._lease)
        return answer

    def _read(self, *command: Any) -> Any:
        """One command's answer, and then whether to believe it: what was lost before it was, shows after it."""
        answer, meta = self._server.pipeline(command, ("HMGET", self._meta_key, *_META))
        self._guard(meta)
        return answer

    def _guard(self, answer: list[Any]) -> None:
        meta = self._take_in(answer)
        if self._guarded and (meta is None or self._trust.believed != (meta.incarnation, self._server.runs)):
            raise suspicious(self._server.config)

    def _look(self) -> _Meta:
        """The meta there is; a new one if there is none."""
        meta = self._take_in(self._server("HMGET", self._meta_key, *_META))
        if meta is None:
            meta = self._take_in(self._server.script("begin", self._keys, _SCHEMA, new_id(), new_id()))
        assert meta is not None
        return meta

    def _take_in(self, answer: list[Any]) -> _Meta | None:
        schema, epoch, revision, incarnation = answer
        self._trust.seen = incarnation or ""
        if schema is None:
            return None
        if schema != _SCHEMA:
            raise Unavailable(
                "INDEX_VERSION_UNKNOWN",
                f"{self._server.config.where} has schema {schema} under {self._base}, {_SCHEMA} is known here; start "
                "with another --redis-prefix: the index is made anew from the log",
            )
        return _Meta(Position(epoch, int(revision)), incarnation)


class _Rebuild:
    """Applies to keys that nobody reads yet."""

    def __init__(self, index: RedisIndex, keys: list[str], token: str) -> None:
        self._index = index
        self._keys = keys
        self._token = token

    def apply(self, write: Write) -> int | None:
        revision: int | None = self._index._apply(write, self._keys, self._token)
        return revision


def _stored(text: str | None) -> Stored | None:
    if text is None:
        return None
    seq, _, state = text.partition(" ")
    return Stored(int(seq), state)


def _revision(key: str) -> int:
    return int(key.partition("-")[0])
