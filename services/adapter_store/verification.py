"""A check of everything: every blob that a version needs is read and hashed again, weights that are kept in their pack
are put together and hashed as well, and the index is compared with the log.

Memory holds a digest for each blob and one chunk. Blobs that no version needs are no problem: a collection takes them.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import dataclass, field

from services.adapter_store.blobs.interface import BlobReader, Blobs
from services.adapter_store.collection import digests_of
from services.adapter_store.index.interface import Index, Write
from services.adapter_store.journal import Journal
from services.adapter_store.log.entry import VersionAdded
from services.adapter_store.log.fold import AdapterState
from services.adapter_store.log.interface import StreamInfo
from services.adapter_store.original import open_weights
from services.adapter_store.records import VersionContent
from services.adapter_store.streams import adapter_of, base_model_stream, index_write
from services.common.errors import DataLoss, NotFound

MAX_LISTED = 1000
_CHUNK_BYTES = 1 << 20


@dataclass(slots=True)
class Verified:
    """What was read, and what is wrong. problems: the first MAX_LISTED, and how many more there are."""

    blobs: int = 0
    bytes: int = 0
    entries: int = 0
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        self.problem_count += 1
        if len(self.problems) < MAX_LISTED:
            self.problems.append(problem)


def verify(blobs: Blobs, journal: Journal, index: Index) -> Verified:
    """Read everything. Nothing is changed; what is registered meanwhile may or may not be looked at."""
    found, seen, streams = Verified(), set[str](), set[str]()
    for info in journal.entries.streams():
        streams.add(info.stream)
        try:
            contents = _check_stream(info, journal, index, found)
        except DataLoss as error:
            found.add(error.message)
            continue
        for number, content in contents.items():
            for digest in digests_of(content):
                if digest not in seen:
                    seen.add(digest)
                    _check_blob(blobs, digest, f"{adapter_of(info.stream)}@{number}", found)
            if content.weights_digest not in seen:
                seen.add(content.weights_digest)
                _check_weights(blobs, content, f"{adapter_of(info.stream)}@{number}", found)
    for stream, seq in index.seqs():
        if stream not in streams and journal.entries.read(stream, seq) is None:
            found.add(f"the index has {stream}, of which the log has nothing")
    return found


def _check_stream(info: StreamInfo, journal: Journal, index: Index, found: Verified) -> dict[int, VersionContent]:
    """Compare a stream with the index: the contents of its versions that are not collected."""
    before, contents, last = index.get(info.stream), dict[int, VersionContent](), None
    covered = 0 if before is None else before.seq
    for seq, entry, state in journal.replay(info):
        found.entries += 1
        if isinstance(entry.body, VersionAdded):
            contents[entry.body.number] = entry.body.content
            if seq <= covered:
                _check_documents(index_write(info.stream, seq, entry, state), index, found)
        last = index_write(info.stream, seq, entry, state)
    assert last is not None
    stored = index.get(info.stream)
    if stored is None or stored.seq < last.seq:
        stored = index.get(info.stream)  # an entry that was being applied is there by now
    if stored is None or stored.seq < last.seq:
        at = 0 if stored is None else stored.seq
        found.add(f"the index has {info.stream} to entry {at}, the log to {last.seq}; restart the store, or reindex")
    elif stored.seq == last.seq and json.loads(stored.state) != json.loads(last.state):
        found.add(f"the index says something else of {info.stream} than its log; reindex")
    if not isinstance(state, AdapterState):
        return {}
    if index.get(base_model_stream(adapter_of(info.stream).name)) is not None:
        found.add(f"{adapter_of(info.stream)} has a base model's name, and a request for it means that model")
    return {number: content for number, content in contents.items() if not state.versions[number - 1].collected}


def _check_documents(write: Write, index: Index, found: Verified) -> None:
    there = index.documents(write.stream, write.documents)
    for key, document in write.documents.items():
        if key not in there or json.loads(there[key]) != json.loads(document):
            found.add(f"the index says something else of {write.stream} version {key} than its log; reindex")


def _check_blob(blobs: Blobs, digest: str, version: str, found: Verified) -> None:
    try:
        reader = blobs.open(digest)
    except NotFound:
        found.add(f"{version} needs {digest}, which is not there; restore it")
        return
    found.blobs += 1
    found.bytes += reader.size
    if _hashed(reader) != digest:
        found.add(f"{version} needs {digest}, whose bytes have changed; restore it, or register the version again")


def _check_weights(blobs: Blobs, content: VersionContent, version: str, found: Verified) -> None:
    """Weights without a blob of their own; what is wrong with those that they are made of is told there."""
    try:
        is_sound = _hashed(open_weights(blobs, content)) == content.weights_digest
    except (NotFound, DataLoss):
        is_sound = False
    if not is_sound:
        found.add(f"the weights of {version} do not come out as they were uploaded; register the version again")


def _hashed(reader: BlobReader) -> str:
    hashed, offset = hashlib.sha256(), 0
    with closing(reader):
        while data := reader.read(offset, _CHUNK_BYTES):
            hashed.update(data)
            offset += len(data)
    return f"sha256:{hashed.hexdigest()}"
