"""What a replica remembers of each adapter it was asked for: its state, and how it fared."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from services.common.errors import MultiloraError
from services.inference.adapters.states import AdapterState, Transitions, transition
from services.inference.engine.request import AdapterVersion

MAX_REMEMBERED = 10_000
"""Versions remembered; those that are nowhere above the disk are forgotten, the longest unused first."""


@dataclass(eq=False, slots=True)
class Tracked:
    """One content digest. Times are seconds of the manager's clock.

    names: every name and version under which it was asked for
    fetching: whether a fetch is under way, or waits for its next attempt
    unloading: whether it drains as soon as it is here
    attempts: in a row that brought nothing; attempt_at: when the next one starts, if it waits
    failures: in a row; error, retry_at: of the last one, and until when it is left alone
    used_at: when a request last had it
    """

    adapter: AdapterVersion
    state: AdapterState
    names: set[tuple[str, int]] = field(default_factory=set)
    requests: int = 0
    fetching: bool = False
    unloading: bool = False
    attempts: int = 0
    attempt_at: float | None = None
    failures: int = 0
    error: MultiloraError | None = None
    retry_at: float = 0.0
    used_at: float = 0.0

    def __str__(self) -> str:
        return f"{self.adapter.name}@{self.adapter.version}"


class TrackedAdapters:
    """Owns the records, by content digest.

    is_on_disk: whether this node's disk has a version; forget: whether a record may be forgotten
    """

    def __init__(self, is_on_disk: Callable[[AdapterVersion], bool], forget: Callable[[Tracked], bool]) -> None:
        self._is_on_disk = is_on_disk
        self._forget = forget
        self._records: OrderedDict[str, Tracked] = OrderedDict()
        self.transitions: Transitions = Transitions()

    def __iter__(self) -> Iterator[Tracked]:
        """The one asked for last first."""
        return iter(list(reversed(self._records.values())))

    def __getitem__(self, digest: str) -> Tracked:
        return self._records[digest]

    def get(self, digest: str) -> Tracked | None:
        return self._records.get(digest)

    def named(self, name: str, version: int | None = None) -> list[Tracked]:
        """The records asked for under a name; under one version of it, when one is given."""
        return [
            tracked
            for tracked in self
            if any(known == name and version in (None, number) for known, number in tracked.names)
        ]

    def remember(self, adapter: AdapterVersion) -> Tracked:
        """The record of an adapter that is asked for now."""
        tracked = self._records.get(adapter.digest)
        if tracked is None:
            state = AdapterState.DISK if self._is_on_disk(adapter) else AdapterState.STORE
            tracked = self._records[adapter.digest] = Tracked(adapter, state)
            if len(self._records) > MAX_REMEMBERED:
                self._forget_one(but=tracked)
        tracked.names.add((adapter.name, adapter.version))
        self._records.move_to_end(adapter.digest)
        self.settle(tracked)
        return tracked

    def move(self, tracked: Tracked, *targets: AdapterState) -> None:
        """Take one arrow after the other."""
        for target in targets:
            tracked.state = transition(tracked.state, target, str(tracked), self.transitions)

    def settle(self, tracked: Tracked) -> None:
        """What the disk's bound has evicted is only in the store."""
        if tracked.state is AdapterState.DISK and not tracked.fetching and not self._is_on_disk(tracked.adapter):
            self.move(tracked, AdapterState.STORE)

    def _forget_one(self, but: Tracked) -> None:
        for digest, tracked in self._records.items():
            if tracked is not but and self._forget(tracked):
                del self._records[digest]
                return
