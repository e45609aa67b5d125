"""Replacing an index in Redis: by keys that nobody reads yet, which take the place of the others in one script."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from services.adapter_store.index.redis_config import RedisConfig
from services.adapter_store.index.redis_server import RedisServer, new_id
from services.adapter_store.steps import commit_step
from services.common.errors import Unavailable

# A rebuild that wrote nothing for this long has died; until then other writers wait for it.
LEASE_SECONDS = 60.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Lease:
    """The key that says who rebuilds, and how long it, and what he writes, outlives him."""

    key: str
    seconds: float

    @property
    def ms(self) -> int:
        return int(self.seconds * 1000)


@contextlib.contextmanager
def replacing(
    server: RedisServer, base: str, kept: Sequence[str], lease: Lease, meta: Mapping[str, str | int]
) -> Iterator[tuple[list[str], str]]:
    """The keys to write to, in the order of `kept`, which they replace when the block ends well; and the token that
    whoever writes shows. `kept[0]` is of the meta. Raises Unavailable when another process rebuilds for too long."""
    token = new_id()
    keys = [key.replace(base, f"{base}:new:{token}", 1) for key in kept]
    _take(server, lease, token)
    try:
        server.pipeline(
            ("HSET", keys[0], *(word for pair in meta.items() for word in pair)),
            ("PEXPIRE", keys[0], lease.ms),
        )
        yield keys, token
        if not server.script("replace", [*kept, *keys, lease.key], token):
            raise interrupted(server.config, lease)
    except BaseException:
        with contextlib.suppress(Unavailable):  # what is left expires
            server.script("abandon", [*keys, lease.key], token)
        raise
    commit_step("index.redis.rebuilt")


def _take(server: RedisServer, lease: Lease, token: str) -> None:
    deadline = time.monotonic() + lease.seconds
    while not server("SET", lease.key, token, "NX", "PX", lease.ms):
        if time.monotonic() > deadline:
            raise rebuilding(server.config)
        time.sleep(POLL_SECONDS)


def rebuilding(config: RedisConfig) -> Unavailable:
    return Unavailable(
        "INDEX_REBUILDING",
        f"the index on {config.where} is being rebuilt by another process; try again when that ended",
        retry_after=5.0,
    )


def interrupted(config: RedisConfig, lease: Lease) -> Unavailable:
    return Unavailable(
        "INDEX_REBUILD_INTERRUPTED",
        f"the rebuild stood still for {lease.seconds:g} s, or {config.where} lost it; nothing was changed; "
        "run it again",
    )


def suspicious(config: RedisConfig) -> Unavailable:
    return Unavailable(
        "INDEX_HEALING",
        f"the index on {config.where} was restarted or lost entries, and is compared with the log now; try again",
        retry_after=1.0,
    )
