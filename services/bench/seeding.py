"""Many adapters in a store, made by the store's own code without its RPCs.

One adapter is uploaded, checked and packed through `Registration`; every other one is an entry that `Journal.commit`
appends to a log of its own and applies to the index, as a registration does once its blobs are there. The adapters
have different names and share the bytes of the first.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from services.adapter_store.backends import INDEX_FILE, open_index, open_place
from services.adapter_store.journal import Folded, Journal
from services.adapter_store.log.entry import Body, VersionAdded
from services.adapter_store.records import UploadHeader, VersionContent
from services.adapter_store.store import AdapterStore
from services.adapter_store.streams import adapter_stream
from services.bench.adapters import BASE_MODEL, CONFIG_FILE, WEIGHTS_FILE, Files, base_config, make_adapter
from services.common.profile import profile_from_config
from services.common.references import AdapterName

TENANT = ACTOR = "bench"
_THREADS = 8  # an entry is synced to disk before the next is written; several may wait for the disk at once
_MAX_UPLOAD_BYTES = 1 << 20


def adapter_name(number: int) -> str:
    return f"adapter-{number:06d}"


def seed(
    root: Path,
    adapters: int,
    *,
    base_model: str = BASE_MODEL,
    config_json: str = "",
    files: Files | None = None,
    max_lora_rank: int = 64,
) -> None:
    """A store on disk with a SQLite index. Without a config and files: the benchmark's own base and adapter."""
    files = files or make_adapter(0)
    root.mkdir(parents=True)
    blobs, entries = open_place(str(root), staging=root)
    store = AdapterStore(blobs, entries, open_index(str(root / INDEX_FILE)), max_upload_bytes=_MAX_UPLOAD_BYTES)
    try:
        store.changes.register_base_model(
            profile_from_config(base_model, config_json or base_config(), max_lora_rank=max_lora_rank)
        )
        header = UploadHeader(AdapterName(TENANT, adapter_name(0)), base_model)
        with store.registration.begin_upload(header) as upload:
            upload.write(CONFIG_FILE, files.config)
            upload.write(WEIGHTS_FILE, bytes(files.weights))
            content = store.registration.register(header, upload).version.content
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(partial(_add, store.journal, content), range(1, adapters)))
    finally:
        store.close()


def copy_log(root: Path, index: str) -> None:
    """Another index of the same store, made from its log."""
    blobs, entries = open_place(str(root), staging=root)
    store = AdapterStore(blobs, entries, open_index(index), max_upload_bytes=0)
    try:
        store.journal.rebuild()
    finally:
        store.close()


def _add(journal: Journal, content: VersionContent, number: int) -> None:
    def decide(_: Folded) -> Body:
        return VersionAdded(1, content, stable=True)

    journal.commit(adapter_stream(AdapterName(TENANT, adapter_name(number))), decide, actor=ACTOR)
