"""What test_kill.py runs as a process of its own, to be killed: `python -m tests.adapter_store.killed OP PLACES`.

PLACES is JSON: blobs, index, staging and endpoint_url of a store, prefix of an index in Redis, and target, the
directory of a copy, whose index is of the same kind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.adapter_store.backends import open_index, open_place
from services.adapter_store.copying import Copied, copy_store
from services.adapter_store.records import Registered, UploadHeader
from services.adapter_store.store import AdapterStore
from services.common.references import AdapterName
from services.common.split import Target
from tests.adapter_store.conftest import MAX_UPLOAD_BYTES
from tests.adapter_store.uploads import BASE_MODEL, make_adapter

NAME = AdapterName("acme", "x")
AHEAD_SECONDS = 5.0
SPLIT = (Target(1, 9), Target(2, 1))


def open_store(places: dict[str, str]) -> AdapterStore:
    """A store that collects whatever is deleted, at once: by its clock, blobs of the same second on S3 are older."""
    opened = open_place(places["blobs"], staging=Path(places["staging"]), endpoint_url=places["endpoint_url"] or None)
    return AdapterStore(
        *opened,
        open_index(places["index"], prefix=places.get("prefix", "")),
        max_upload_bytes=MAX_UPLOAD_BYTES,
        delete_grace=0,
        blob_grace=-AHEAD_SECONDS,
    )


def open_target(places: dict[str, str]) -> AdapterStore:
    target = {"blobs": places["target"], "endpoint_url": ""}
    if prefix := places.get("prefix"):
        return open_store(places | target | {"prefix": f"{prefix}-target"})
    return open_store(places | target | {"index": f"{places['target']}/index.sqlite3"})


def register(store: AdapterStore, seed: int, **fields: Any) -> Registered:
    header = UploadHeader(NAME, BASE_MODEL, **fields)
    upload = store.registration.begin_upload(header)
    for file, data in make_adapter(seed=seed).files().items():
        upload.write(file, data)
    return store.registration.register(header, upload, actor="killed")


def copy(store: AdapterStore, places: dict[str, str]) -> Copied:
    target = open_target(places)
    try:
        return copy_store(store.journal, store.blobs, target.journal, target.blobs, lambda _: None)
    finally:
        target.close()


OPERATIONS: dict[str, Callable[[AdapterStore, dict[str, str]], object]] = {
    "register": lambda store, _: register(store, 3, promote=True),
    "alias": lambda store, _: store.changes.set_alias(NAME, "stable", SPLIT),
    "delete": lambda store, _: store.changes.delete_version(NAME, 2),
    "collect": lambda store, _: store.collection.collect(dry_run=False),
    "reindex": lambda store, _: store.journal.rebuild(),
    "copy": copy,
}


def main() -> None:
    operation, places = sys.argv[1], json.loads(sys.argv[2])
    store = open_store(places)
    store.heal()
    OPERATIONS[operation](store, places)
    store.close()


if __name__ == "__main__":
    main()
