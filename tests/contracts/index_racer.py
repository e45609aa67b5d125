"""A process that races others for an index: `python -m tests.contracts.index_racer PLACE [PREFIX]` prints its wins."""

from __future__ import annotations

import sys
from pathlib import Path

from services.adapter_store.index.interface import FEED_LENGTH, Index, Write
from services.adapter_store.index.redis import RedisIndex
from services.adapter_store.index.redis_config import RedisConfig
from services.adapter_store.index.sqlite import SqliteIndex

STREAM = "adapters/acme/raced"
ENTRIES = 60


def open_at(place: str, prefix: str = "", *, feed_length: int = FEED_LENGTH) -> Index:
    if prefix:
        return RedisIndex(RedisConfig.parse(place, prefix, {}), feed_length=feed_length)
    return SqliteIndex(Path(place), feed_length=feed_length)


def main() -> None:
    index = open_at(*sys.argv[1:])
    for seq in range(1, ENTRIES + 1):
        revision = index.apply(Write(STREAM, seq, "{}", "{}", {str(seq): "{}"}, [f"sha256:{seq}"], live=seq))
        if revision is not None:
            print(revision)
    index.close()


if __name__ == "__main__":
    main()
