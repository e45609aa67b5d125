"""Garbage collection: mark what the log needs, sweep the rest.

    compare log and index → in every log, give up what has expired and mark the digests of the rest → sweep

The marks come from the logs, never from the index. Safe beside registrations: a blob that was committed, or committed
again, less than `blob_grace` before the collection began is spared, and a registration appends its entry well within
that of its commits. Safe beside undeletes: both are entries of one log, so one comes first and the other sees it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.adapter_store.blobs.interface import Blobs
from services.adapter_store.journal import Folded, Journal
from services.adapter_store.log.entry import Body, VersionAdded, VersionCollected
from services.adapter_store.log.fold import AdapterState
from services.adapter_store.log.interface import StreamInfo
from services.adapter_store.records import VersionContent
from services.adapter_store.steps import commit_step
from services.adapter_store.streams import ADAPTERS, adapter_of
from services.common.errors import DataLoss

DELETE_GRACE_SECONDS = 7 * 24 * 3600.0
BLOB_GRACE_SECONDS = 3600.0
MAX_LISTED = 1000

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Collected:
    """What a collection removed, or would. digests: the first MAX_LISTED."""

    blobs: int = 0
    bytes: int = 0
    versions: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)


def digests_of(content: VersionContent) -> tuple[str, str, str]:
    """The blobs that a version needs."""
    return content.config_digest, content.weights_header_digest or content.weights_digest, content.pack_digest


class Collection:
    """delete_grace: seconds after its deletion in which a version can be brought back; blob_grace: see above."""

    def __init__(self, blobs: Blobs, journal: Journal, *, delete_grace: float, blob_grace: float) -> None:
        self._blobs = blobs
        self._journal = journal
        self._delete_grace_ns = int(delete_grace * 1e9)
        self._blob_grace_ns = int(blob_grace * 1e9)

    def collect(self, *, dry_run: bool, actor: str = "") -> Collected:
        """Raises DataLoss, before anything is removed, when a log cannot be read to its end."""
        began = self._journal.clock()
        self._journal.check()
        known = {stream for stream, _ in self._journal.index.seqs()}
        collected, marks = Collected(), set[str]()
        for info in self._journal.entries.streams():
            known.discard(info.stream)
            if info.stream.startswith(ADAPTERS):
                marks.update(self._mark(info, began - self._delete_grace_ns, dry_run, actor, collected))
        if known:
            raise _not_listed(min(known))
        self._sweep(marks, began - self._blob_grace_ns, dry_run, collected)
        log.info(
            "collected %d versions, %d blobs, %d bytes%s",
            len(collected.versions),
            collected.blobs,
            collected.bytes,
            ", only in thought" if dry_run else "",
        )
        return collected

    def _mark(self, info: StreamInfo, before_ns: int, dry_run: bool, actor: str, collected: Collected) -> Iterator[str]:
        """Give up what has expired; the digests that the adapter needs from then on."""
        contents, state = dict[int, VersionContent](), AdapterState()
        for _, entry, folded in self._journal.replay(info):
            assert isinstance(folded, AdapterState)
            state = folded
            if isinstance(entry.body, VersionAdded):
                contents[entry.body.number] = entry.body.content
        for number, content in contents.items():
            version = state.versions[number - 1]
            if version.collected:
                continue
            if _expired(state, number, before_ns) and (dry_run or self._give_up(info.stream, number, before_ns, actor)):
                collected.versions.append(f"{adapter_of(info.stream)}@{number}")
                continue
            yield from digests_of(content)

    def _give_up(self, stream: str, number: int, before_ns: int, actor: str) -> bool:
        """False when the version was brought back since."""

        def decide(folded: Folded) -> Body | None:
            assert isinstance(folded.state, AdapterState)
            return VersionCollected(number) if _expired(folded.state, number, before_ns) else None

        state = self._journal.commit(stream, decide, actor=actor).state
        commit_step("collect.given_up")
        assert isinstance(state, AdapterState)
        return state.versions[number - 1].collected

    def _sweep(self, marks: set[str], before_ns: int, dry_run: bool, collected: Collected) -> None:
        for blob in self._blobs.list():
            if blob.digest in marks or blob.modified_ns >= before_ns:
                continue
            if dry_run or self._blobs.delete(blob.digest, before_ns=before_ns):
                commit_step("collect.swept")
                collected.blobs += 1
                collected.bytes += blob.size
                if len(collected.digests) < MAX_LISTED:
                    collected.digests.append(blob.digest)


def _not_listed(stream: str) -> DataLoss:
    return DataLoss(
        "LOG_INCOMPLETE",
        f"the log does not list {stream}, which the index knows; nothing was swept; check the log's storage, then try "
        "again",
        stream=stream,
    )


def _expired(state: AdapterState, number: int, before_ns: int) -> bool:
    version = state.versions[number - 1]
    return version.deleted_ns is not None and version.deleted_ns <= before_ns and not version.collected
