"""What an index backend offers: the fold of the log, made fast. It can be lost and made again (`reindex`).

It keeps, by stream (`adapters/<tenant>/<name>`, `base_models/<name>`), the folded state and how many entries of the log
it covers. States, documents and changes are opaque JSON text here: log/fold.py makes them, names.py reads them.
`apply` is the only write in the day's work and is one atomic transaction. Every entry applied gets the next revision of
the whole index and stands in a bounded feed of changes, which Watch reads.
The epoch is a random id made when the index is; a revision means something only together with its epoch.
`tests/contracts/test_index.py` is what every backend passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

# Changes kept for Watch clients that were away; whoever is further behind lists again.
FEED_LENGTH = 10_000


@dataclass(frozen=True, slots=True)
class Position:
    """Where an index is: revision counts the entries applied in this epoch."""

    epoch: str
    revision: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A stream as the index has it: entries 1 to `seq` folded."""

    seq: int
    state: str


# A state, and documents by key; a key without one is left out.
Looked = tuple[Stored, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the feed."""

    revision: int
    stream: str
    change: str


@dataclass(frozen=True, slots=True)
class Write:
    """What applying one entry changes.

    state: the stream's new folded state
    change: what the feed says of it
    documents: key to document, as `3` of version 3 and `3/modules` of its modules; added, never changed
    packs: pack digests that may be pulled from now on; added, never removed
    live: versions of the stream that are not deleted, after this entry; 0 for base models
    """

    stream: str
    seq: int
    state: str
    change: str
    documents: Mapping[str, str] = field(default_factory=dict)
    packs: Sequence[str] = ()
    live: int = 0


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over all streams: adapters are streams with a live version."""

    adapters: int
    versions: int
    base_models: int


class IndexWriter(Protocol):
    """Takes entries in the order of each stream."""

    def apply(self, write: Write) -> int | None:
        """Apply a stream's next entry: the revision it got, or None unless `seq` is the stream's next."""


class Index(IndexWriter, Protocol):
    """One index. Safe to use from several threads, and by several processes at once; every read is one snapshot.

    Every method raises Unavailable when the backend is away.
    """

    def position(self) -> Position: ...

    def get(self, stream: str) -> Stored | None:
        """A stream's state."""

    def scan(self, prefix: str, after: str, limit: int) -> list[tuple[str, Stored]]:
        """Up to `limit` streams that begin with `prefix` and come after `after` (empty: from the first), bytewise."""

    def seqs(self) -> Iterator[tuple[str, int]]:
        """Every stream with how many entries of it are applied, in no order."""

    def documents(self, stream: str, keys: Iterable[str]) -> dict[str, str]:
        """The documents of a stream by key; a key without one is left out."""

    def lookup(self, stream: str, hint: str, wanted: Callable[[Stored], Iterable[str]]) -> Looked | None:
        """A stream's state and those of its documents that `wanted` names for it, in one go; None without the stream.

        hint: the alias or version that is looked up, by which a backend far away may guess the documents.
        """

    def has_pack(self, digest: str) -> bool:
        """Whether a version, deleted or not, has these packed bytes."""

    def named(self, name: str) -> str | None:
        """A stream `adapters/<any tenant>/<name>`, if there is one."""

    def totals(self) -> Totals: ...

    def changes(self, after: int, limit: int) -> list[Change] | None:
        """Up to `limit` changes above revision `after`, in order.

        None when the feed no longer reaches back that far, or `after` is above the index's own revision.
        """

    def renew(self, epoch: str) -> Position:
        """Begin a new epoch, unless another process did: nothing happens unless the epoch still is `epoch`.

        The revision goes on; the feed is emptied. Returns the position then.
        """

    def suspect(self) -> bool:
        """Whether the backend may have lost entries since this process last compared it with the log.

        Until `healing` ended well, every read but `position` and `changes` raises Unavailable: an old answer, or none,
        would be wrong. As of the last call of another method; costs nothing.
        """

    def healing(self) -> AbstractContextManager[Index]:
        """The same index, to be compared with the log and caught up; readable though suspect."""

    def rebuild(self) -> AbstractContextManager[IndexWriter]:
        """Replace everything by what is applied within the `with` block, in a new epoch, from revision 1.

        Readers see the old index until the block ends well, and the new one after it; an error leaves the old one.
        """

    def close(self) -> None: ...
