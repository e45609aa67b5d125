"""What a log says: the fold of its entries, one pure function for each kind of stream, used by every index.

Writers check a change against the folded state before they append it, and the append fails if that state is no longer
the last; so an entry that does not fit the state before it means a damaged log, and is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from services.adapter_store.log.entry import (
    AliasDeleted,
    AliasSet,
    BaseModelSet,
    Entry,
    VersionAdded,
    VersionCollected,
    VersionDeleted,
    VersionUndeleted,
)
from services.common.errors import DataLoss
from services.common.profile import BaseModelProfile
from services.common.references import STABLE
from services.common.split import Target


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version, less what never changes. deleted_ns: when it was deleted, nanoseconds since 1970; None: it lives."""

    content_digest: str
    base_model: str
    created_ns: int
    deleted_ns: int | None = None
    collected: bool = False

    @property
    def live(self) -> bool:
        return self.deleted_ns is None


@dataclass(frozen=True, slots=True)
class AdapterState:
    """An adapter after some of its entries. `versions[n - 1]` is version n; targets stand by version."""

    versions: tuple[VersionState, ...] = ()
    aliases: Mapping[str, tuple[Target, ...]] = field(default_factory=dict)

    def version(self, number: int) -> VersionState | None:
        return self.versions[number - 1] if 1 <= number <= len(self.versions) else None

    @property
    def live(self) -> list[int]:
        """Numbers of the versions that are not deleted, in order."""
        return [number for number, version in enumerate(self.versions, 1) if version.live]

    def with_content(self, content_digest: str) -> int | None:
        """Number of the live version with this content."""
        for number, version in enumerate(self.versions, 1):
            if version.live and version.content_digest == content_digest:
                return number
        return None

    def aliases_of(self, number: int) -> tuple[str, ...]:
        """The aliases that point to a version, by name."""
        return tuple(
            alias for alias, targets in sorted(self.aliases.items()) if number in {target.version for target in targets}
        )

    def to_json(self) -> str:
        versions = [[v.content_digest, v.base_model, v.created_ns, v.deleted_ns, v.collected] for v in self.versions]
        aliases = {alias: [[t.version, t.weight] for t in self.aliases[alias]] for alias in sorted(self.aliases)}
        return json.dumps({"versions": versions, "aliases": aliases}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> AdapterState:
        fields = json.loads(text)
        return cls(
            tuple(VersionState(*version) for version in fields["versions"]),
            {alias: tuple(Target(*target) for target in targets) for alias, targets in fields["aliases"].items()},
        )


def fold_adapter(state: AdapterState, entry: Entry) -> AdapterState:
    """The state after one more entry. Raises DataLoss when the entry does not fit."""
    match entry.body:
        case VersionAdded(number, content, stable):
            _check(number == len(state.versions) + 1, entry, f"it adds version {number}")
            added = VersionState(content.content_digest, content.base_model, entry.at_ns)
            aliases = {**state.aliases, STABLE: (Target(number),)} if stable else state.aliases
            return AdapterState((*state.versions, added), aliases)
        case AliasSet(alias, targets):
            known = all((version := state.version(target.version)) and version.live for target in targets)
            _check(bool(targets) and known, entry, f"it points {alias} to what is not there")
            return replace(state, aliases={**state.aliases, alias: tuple(sorted(targets))})
        case AliasDeleted(alias):
            _check(alias in state.aliases, entry, f"it deletes {alias}")
            return replace(state, aliases={name: to for name, to in state.aliases.items() if name != alias})
        case VersionDeleted(number):
            version = state.version(number)
            fits = version is not None and version.live and not state.aliases_of(number)
            _check(fits, entry, f"it deletes version {number}")
            return _changed(state, number, deleted_ns=entry.at_ns)
        case VersionUndeleted(number):
            version = state.version(number)
            fits = version is not None and not version.live and not version.collected
            _check(fits, entry, f"it undeletes version {number}")
            return _changed(state, number, deleted_ns=None)
        case VersionCollected(number):
            version = state.version(number)
            fits = version is not None and not version.live and not version.collected
            _check(fits, entry, f"it collects version {number}")
            return _changed(state, number, collected=True)
        case _:
            raise _misfit(entry, "it is no adapter's")


def fold_base_model(entry: Entry) -> BaseModelProfile:
    """The profile after one more entry, whatever it was before. Raises DataLoss for an entry of another kind."""
    if not isinstance(entry.body, BaseModelSet):
        raise _misfit(entry, "it is no base model's")
    return entry.body.profile


def _changed(state: AdapterState, number: int, **fields: int | bool | None) -> AdapterState:
    versions = list(state.versions)
    versions[number - 1] = replace(versions[number - 1], **fields)  # type: ignore[arg-type]
    return replace(state, versions=tuple(versions))


def _check(fits: bool, entry: Entry, what: str) -> None:
    if not fits:
        raise _misfit(entry, what)


def _misfit(entry: Entry, what: str) -> DataLoss:
    return DataLoss(
        "LOG_INCONSISTENT",
        f"log entry {entry.id} ({entry.body.kind}) does not fit the entries before it: {what}; restore the log",
        entry=entry.id,
    )
