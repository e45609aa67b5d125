"""The adapter store as a few dictionaries: what it answers, without a log, an index, bytes or a crash.

Written from what the contract says and not from the store's code, so that the two can disagree. Answers are plain
tuples; a refusal is `Refused` with the reason that the store gives. Time stands still unless a test moves `now_ns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

DELETE_GRACE_NS = 100 * 10**9
START_NS = 1_900_000_000 * 10**9

Targets = tuple[tuple[int, int], ...]


class Refused(Exception):
    """The reason of the error that the store raises."""


@dataclass(frozen=True)
class Content:
    """An upload, and the blobs it needs: digest to size. The pack is the store's own making, so it is told later."""

    key: str
    files: dict[str, bytes]
    blobs: dict[str, int]

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass
class Version:
    content: Content
    created_ns: int
    deleted_ns: int | None = None
    collected: bool = False

    @property
    def live(self) -> bool:
        return self.deleted_ns is None


@dataclass(frozen=True)
class Row:
    """One entry of an adapter's history."""

    kind: str
    version: int
    alias: str
    at_ns: int
    actor: str
    targets: Targets = ()


@dataclass
class Adapter:
    versions: list[Version] = field(default_factory=list)
    aliases: dict[str, Targets] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)

    def live(self) -> list[int]:
        return [number for number, version in enumerate(self.versions, 1) if version.live]

    def with_content(self, content: Content) -> int:
        return next((number for number in self.live() if self.versions[number - 1].content == content), 0)

    def pointing_to(self, number: int) -> tuple[str, ...]:
        return tuple(sorted(alias for alias, to in self.aliases.items() if number in [version for version, _ in to]))


class Model:
    def __init__(self) -> None:
        self.now_ns = START_NS
        self.adapters: dict[str, Adapter] = {}
        self.blobs: dict[str, int] = {}
        self.log: list[tuple[str, int, Row]] = []  # of all adapters, as it came

    # What changes

    def register(self, name: str, content: Content, *, promote: bool, actor: str) -> tuple[Any, bool]:
        adapter = self.adapters.setdefault(name, Adapter())
        number = adapter.with_content(content)
        if number:
            if promote and adapter.aliases.get("stable") != ((number, 1),):
                self._point(name, "stable", ((number, 1),), actor)
            return self.version(name, number), True
        adapter.versions.append(Version(content, self.now_ns))
        self.blobs |= content.blobs
        number = len(adapter.versions)
        stable = promote or number == 1
        if stable:
            adapter.aliases["stable"] = ((number, 1),)
        self._add(name, "version", number, "stable" if stable else "", actor, ((number, 1),) if stable else ())
        return self.version(name, number), False

    def set_alias(
        self, name: str, alias: str, targets: Sequence[tuple[int, int]], expected: int | None, actor: str
    ) -> Any:
        if alias == "latest":
            raise Refused("ALIAS_RESERVED")
        if alias.isdigit():
            raise Refused("INVALID_ALIAS")
        adapter = self._existing(name, expected)
        wanted = tuple(sorted(targets))
        for number, _ in wanted:
            self._living(adapter, number)
        if adapter.aliases.get(alias) != wanted:
            self._point(name, alias, wanted, actor)
        return self.adapter(name)

    def delete_alias(self, name: str, alias: str, expected: int | None, actor: str) -> Any:
        if alias == "latest":
            raise Refused("ALIAS_RESERVED")
        if alias.isdigit():
            raise Refused("INVALID_ALIAS")
        adapter = self._existing(name, expected)
        if alias not in adapter.aliases:
            raise Refused("ALIAS_NOT_FOUND")
        if alias == "stable" and set(adapter.live()) - {number for number, _ in adapter.aliases[alias]}:
            raise Refused("STABLE_IN_USE")
        del adapter.aliases[alias]
        self._add(name, "alias_deleted", 0, alias, actor)
        return self.adapter(name)

    def delete_version(self, name: str, number: int, actor: str) -> None:
        adapter = self._existing(name)
        version = self._living(adapter, number)
        if adapter.pointing_to(number):
            raise Refused("VERSION_IN_USE")
        version.deleted_ns = self.now_ns
        self._add(name, "version_deleted", number, "", actor)

    def undelete_version(self, name: str, number: int, actor: str) -> None:
        adapter = self._existing(name)
        if not 1 <= number <= len(adapter.versions):
            raise Refused("VERSION_NOT_FOUND")
        version = adapter.versions[number - 1]
        if version.live:
            return
        if version.collected:
            raise Refused("VERSION_COLLECTED")
        if adapter.with_content(version.content):
            raise Refused("CONTENT_LIVES")
        version.deleted_ns = None
        self._add(name, "version_undeleted", number, "", actor)

    def collect(self, *, dry_run: bool, actor: str) -> tuple[list[str], int, int]:
        """Versions given up, blobs swept and their bytes."""
        expired = [
            (name, number)
            for name, adapter in sorted(self.adapters.items())
            for number, version in enumerate(adapter.versions, 1)
            if version.deleted_ns is not None
            and not version.collected
            and version.deleted_ns <= self.now_ns - DELETE_GRACE_NS
        ]
        needed = {
            digest
            for name, adapter in self.adapters.items()
            for number, version in enumerate(adapter.versions, 1)
            if not version.collected and (name, number) not in expired
            for digest in version.content.blobs
        }
        swept = {digest: size for digest, size in self.blobs.items() if digest not in needed}
        if not dry_run:
            for name, number in expired:
                self.adapters[name].versions[number - 1].collected = True
                self._add(name, "version_collected", number, "", actor)
            self.blobs = {digest: size for digest, size in self.blobs.items() if digest in needed}
        return [f"{name}@{number}" for name, number in expired], len(swept), sum(swept.values())

    # What is read

    def resolve(self, name: str, version: int | None, alias: str) -> list[Any]:
        adapter = self._existing(name)
        if version is not None:
            targets: Targets = ((version, 1),)
        elif alias == "latest":
            if not adapter.live():
                raise Refused("VERSION_NOT_FOUND")
            targets = ((max(adapter.live()), 1),)
        elif alias in adapter.aliases:
            targets = adapter.aliases[alias]
        else:
            raise Refused("ALIAS_NOT_FOUND")
        for number, _ in targets:
            self._living(adapter, number)
        return [(target, self.version(name, target[0])) for target in targets]

    def adapter(self, name: str) -> Any:
        """name, aliases, newest live version, live versions, revision"""
        adapter = self._existing(name)
        live = adapter.live()
        return name, dict(adapter.aliases), max(live, default=0), len(live), len(adapter.history)

    def version(self, name: str, number: int) -> Any:
        """number, content, creation, whether deleted, its aliases, whether collected"""
        adapter = self._existing(name)
        if not 1 <= number <= len(adapter.versions):
            raise Refused("VERSION_NOT_FOUND")
        version = adapter.versions[number - 1]
        return (
            number,
            version.content.key,
            version.created_ns,
            not version.live,
            adapter.pointing_to(number),
            version.collected,
        )

    def versions(self, name: str, *, include_deleted: bool) -> list[Any]:
        adapter = self._existing(name)
        numbers = range(len(adapter.versions), 0, -1)
        return [self.version(name, n) for n in numbers if include_deleted or adapter.versions[n - 1].live]

    def totals(self) -> tuple[int, int]:
        """Adapters with a live version, and live versions."""
        live = [len(adapter.live()) for adapter in self.adapters.values()]
        return sum(count > 0 for count in live), sum(live)

    def _existing(self, name: str, expected: int | None = None) -> Adapter:
        adapter = self.adapters.get(name)
        if adapter is None:
            raise Refused("ADAPTER_NOT_FOUND")
        if expected is not None and expected != len(adapter.history):
            raise Refused("REVISION_CONFLICT")
        return adapter

    def _living(self, adapter: Adapter, number: int) -> Version:
        if not 1 <= number <= len(adapter.versions):
            raise Refused("VERSION_NOT_FOUND")
        version = adapter.versions[number - 1]
        if not version.live:
            raise Refused("VERSION_DELETED")
        return version

    def _point(self, name: str, alias: str, targets: Targets, actor: str) -> None:
        self.adapters[name].aliases[alias] = targets
        self._add(name, "alias", 0, alias, actor, targets)

    def _add(self, name: str, kind: str, version: int, alias: str, actor: str, targets: Targets = ()) -> None:
        row = Row(kind, version, alias, self.now_ns, actor, targets)
        self.adapters[name].history.append(row)
        self.log.append((name, len(self.adapters[name].history), row))
