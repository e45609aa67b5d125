"""Copies one store into another, whatever the backends; started again, it goes on where it was cut off.

    for every log: the blobs that its versions need → its entries, one by one, as they are → the target's index

Entries keep their bytes and numbers, so revisions, history and identities are the source's. A blob is hashed as it is
written; what is there already is not written again, and a target whose log says anything else is refused.
What is registered in the source meanwhile is copied by the next run. Blobs of collected versions are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from services.adapter_store.blobs.interface import Blobs
from services.adapter_store.collection import digests_of
from services.adapter_store.journal import Journal
from services.adapter_store.log.entry import VersionAdded
from services.adapter_store.log.fold import AdapterState
from services.adapter_store.log.interface import AdapterLog, StreamInfo
from services.adapter_store.records import VersionContent
from services.adapter_store.steps import commit_step
from services.common.errors import AlreadyExists, DataLoss, NotFound

_CHUNK_BYTES = 1 << 20


@dataclass(slots=True)
class Copied:
    """What was written, and what was there already."""

    streams: int = 0
    entries: int = 0
    blobs: int = 0
    bytes: int = 0
    entries_there: int = 0
    blobs_there: int = 0


def copy_store(
    source: Journal, source_blobs: Blobs, target: Journal, target_blobs: Blobs, progress: Callable[[Copied], None]
) -> Copied:
    """Copy everything; `progress` hears of each stream. Raises DataLoss, AlreadyExists, Unavailable."""
    copied, seen = Copied(), set[str]()
    for info in source.entries.streams():
        for digest in _needed(source, info):
            if digest not in seen:
                seen.add(digest)
                _copy_blob(source_blobs, target_blobs, digest, copied)
        for seq in range(1, info.last + 1):
            _copy_entry(source.entries, target.entries, info.stream, seq, copied)
        target.catch_up(info.stream)
        copied.streams += 1
        progress(copied)
    return copied


def _needed(source: Journal, info: StreamInfo) -> list[str]:
    """Digests that the stream's versions need; reading it to its end checks it first."""
    contents, last = dict[int, VersionContent](), None
    for _, entry, state in source.replay(info):
        last = state
        if isinstance(entry.body, VersionAdded):
            contents[entry.body.number] = entry.body.content
    if not isinstance(last, AdapterState):
        return []
    kept = [content for number, content in contents.items() if not last.versions[number - 1].collected]
    return [digest for content in kept for digest in digests_of(content)]


def _copy_entry(source: AdapterLog, target: AdapterLog, stream: str, seq: int, copied: Copied) -> None:
    data = source.read(stream, seq)
    assert data is not None, f"{stream}/{seq} was there"
    if target.append(stream, seq, data):
        commit_step("copy.entry")
        copied.entries += 1
    elif target.read(stream, seq) == data:
        copied.entries_there += 1
    else:
        raise AlreadyExists(
            "COPY_CONFLICT",
            f"the target has another {stream}/{seq}: it was written to, or is another store's; copy to an empty one",
            field="target",
            stream=stream,
        )


def _copy_blob(source: Blobs, target: Blobs, digest: str, copied: Copied) -> None:
    try:
        target.open(digest).close()
        copied.blobs_there += 1
        return
    except NotFound:
        pass
    with closing(source.open(digest)) as reader, target.create() as partial:
        while data := reader.read(partial.size, _CHUNK_BYTES):
            partial.write(data)
        if partial.digest != digest:
            raise DataLoss("BLOB_CHANGED", f"the source's {digest} has other bytes; restore it, or collect its version")
        partial.commit()
        commit_step("copy.blob")
        copied.blobs += 1
        copied.bytes += reader.size
