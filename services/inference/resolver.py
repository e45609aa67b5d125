"""Adapter references to versions, once per request, from a snapshot of what names mean.

The snapshot fills as names are asked for, and the store's Watch keeps it true (see `name_watch`): while the watch lives
an answer is as fresh as its last message; without it answers are asked for again after `FRESH_SECONDS`. While the store
is away a replica serves on with what names meant last.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from services.common.auth.callers import referenced
from services.common.errors import NotFound, Unavailable
from services.common.split import Target, pick
from services.inference.engine.request import AdapterVersion

FRESH_SECONDS = 2.0
"""How old an answer may be while the store can be asked: an alias moved is followed within this time."""

MAX_REMEMBERED = 10_000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a reference means: one version, or several by weight. reference: in full, `tenant/name:alias`."""

    reference: str
    versions: Mapping[Target, AdapterVersion]

    def pick(self, routing_key: str) -> AdapterVersion:
        """The version for a request; the store and every other replica pick the same for a key."""
        number = pick(list(self.versions), self.reference, routing_key)
        return next(version for target, version in self.versions.items() if target.version == number)


@dataclass(slots=True)
class _Known:
    """asked_at: when the store said so, or never again to be trusted without asking (-inf)."""

    meaning: Meaning
    asked_at: float


def _hiding_keys(version: AdapterVersion) -> tuple[tuple[str, int | None], ...]:
    return (version.name, None), (version.name, version.version)


Lookup = Callable[[str, bool], Awaitable[Meaning]]
"""Asks the store for a reference; and whether its last meaning is known, should the store be away."""


class Resolver:
    """Resolves references. `lookup(reference, known)` asks the store; None when there is no store.

    seen_at: when the watch last said anything, by `clock`
    """

    def __init__(self, base_model: str, lookup: Lookup | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._base_model = base_model
        self._lookup = lookup
        self._clock = clock
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._changes = 0
        self._hidden: dict[tuple[str, int | None], object] = {}
        self.seen_at = -float("inf")

    @property
    def snapshot_age(self) -> float:
        """Seconds since the snapshot was known to be true; inf without a watch."""
        return self._clock() - self.seen_at

    async def resolve(self, reference: str, routing_key: str = "") -> AdapterVersion | None:
        """The version a reference means right now; None is the base model.

        Raises InvalidArgument (malformed), NotFound (adapter, version or alias, here or anywhere), FailedPrecondition
        (another base), Unavailable (the store is away and the name was not asked for before).
        """
        if not reference or reference == self._base_model:
            return None
        version = (await self.meaning(reference)).pick(routing_key)
        if any(key in self._hidden for key in _hiding_keys(version)):
            raise NotFound(
                "ADAPTER_NOT_FOUND",
                f"adapter {reference!r} is unloaded on this replica; load it again, or ask another",
                field="adapter",
            )
        return version

    async def meaning(self, reference: str) -> Meaning:
        """What an adapter reference means right now to the caller, hidden here or not. Raises as `resolve`."""
        full = str(referenced(reference))
        if self._lookup is None:
            raise NotFound(
                "ADAPTER_NOT_FOUND",
                f"adapter {reference!r}: this replica has no adapter store; start it with --adapter-store",
                field="adapter",
            )
        known = self._known.get(full)
        if known is not None and self._is_fresh(known):
            return known.meaning
        try:
            return await self.ask(full)
        except Unavailable:
            if known is None:
                raise
            meant = ", ".join(str(version.version) for version in known.meaning.versions.values())
            log.warning("the store is away; %s still means version %s", full, meant)
            return known.meaning

    def hide(self, name: str, version: int | None) -> None:
        """Answer for a version, or with None for the whole name, as if there were none."""
        self._hidden[name, version] = object()

    def hidings(self, version: AdapterVersion) -> list[object]:
        """What hides a version now, for `show`."""
        return [self._hidden[key] for key in _hiding_keys(version) if key in self._hidden]

    def show(self, hidings: Sequence[object]) -> None:
        """Take back what hid a version; what has come since stays."""
        self._hidden = {key: hiding for key, hiding in self._hidden.items() if hiding not in hidings}

    async def ask(self, full: str) -> Meaning:
        """Ask the store, and remember. `full` is a reference in full. Raises what the store raises."""
        assert self._lookup is not None
        asked_at, changes = self._clock(), self._changes
        try:
            meaning = await self._lookup(full, full in self._known)
        except NotFound:
            self._known.pop(full, None)
            raise
        if changes != self._changes:  # the watch spoke meanwhile, perhaps of this: the answer may be from before
            asked_at = -float("inf")
        self._known[full] = _Known(meaning, asked_at)
        self._known.move_to_end(full)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return meaning

    def seen(self) -> None:
        """The watch lives: nothing has changed but what it said."""
        self.seen_at = self._clock()

    def changed(self, adapter: str) -> list[str]:
        """Names of this adapter must be asked for again; the references that were known."""
        self._changes += 1
        stale = [full for full in self._known if full.startswith((f"{adapter}:", f"{adapter}@"))]
        for full in stale:
            self._known[full].asked_at = -float("inf")
        return stale

    def reset(self) -> None:
        """Every name must be asked for again."""
        self._changes += 1
        for known in self._known.values():
            known.asked_at = -float("inf")

    def _is_fresh(self, known: _Known) -> bool:
        if self.snapshot_age < FRESH_SECONDS and known.asked_at > -float("inf"):
            return True
        return self._clock() - known.asked_at < FRESH_SECONDS
