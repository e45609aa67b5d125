"""What names mean right now: every read, from the index alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from services.adapter_store import refusals
from services.adapter_store.findings import shown
from services.adapter_store.index.interface import Index, Stored, Totals
from services.adapter_store.log.entry import content_of
from services.adapter_store.log.fold import AdapterState
from services.adapter_store.quota import Usage
from services.adapter_store.records import Adapter, Version, VersionContent
from services.adapter_store.streams import (
    ADAPTERS,
    BASE_MODELS,
    adapter_of,
    adapter_stream,
    base_model_stream,
    modules_key,
)
from services.common.auth.callers import adapter_not_found
from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.profile import BaseModelProfile
from services.common.references import LATEST, AdapterName, AdapterReference, parse_name
from services.common.split import Target

DEFAULT_PAGE = 100
MAX_PAGE = 1000


class Catalog:
    def __init__(self, index: Index) -> None:
        self._index = index
        self._sizes: dict[str, tuple[int, int]] = {}  # of a stream: the entries applied, its bytes then

    def base_model(self, name: str) -> BaseModelProfile | None:
        stored = self._index.get(base_model_stream(name))
        return None if stored is None else BaseModelProfile.from_json(stored.state)

    def base_models(self) -> list[BaseModelProfile]:
        """All, by name."""
        found: list[BaseModelProfile] = []
        while page := self._index.scan(BASE_MODELS, base_model_stream(found[-1].name) if found else "", MAX_PAGE):
            found += [BaseModelProfile.from_json(stored.state) for _, stored in page]
        return found

    def profile(self, name: str) -> BaseModelProfile:
        """Raises NotFound, naming those there are."""
        profile = self.base_model(name)
        if profile is None:
            raise refusals.base_model_not_found(name, [known.name for known in self.base_models()])
        return profile

    def resolve(self, reference: AdapterReference, *, base_model: str = "") -> dict[Target, Version]:
        """The versions a reference may mean: one, or those of a weighted alias; `common.split.pick` chooses.

        Raises NotFound, and FailedPrecondition when one is of another base model.
        """
        adapter = reference.adapter
        state, targets = AdapterState(), list[Target]()

        def meant(stored: Stored) -> list[str]:
            nonlocal state, targets
            state = _decoded(stored)[1]
            targets = list(_meant(state, reference))
            return [str(check_live(adapter, state, target.version)) for target in targets]

        hint = reference.alias if reference.version is None else str(reference.version)
        looked = self._index.lookup(adapter_stream(adapter), hint, meant)
        if looked is None:
            raise adapter_not_found(adapter)
        versions = [
            version_record(adapter, state, target.version, content_of(json.loads(looked[1][str(target.version)])))
            for target in targets
        ]
        for version in versions:
            if base_model and version.content.base_model != base_model:
                raise FailedPrecondition(
                    "BASE_MODEL_MISMATCH",
                    f"{version.adapter}@{version.number} is of base model {version.content.base_model}, not of "
                    f"{shown(base_model)}; ask a replica that serves that model",
                    field="base_model",
                    base_model=version.content.base_model,
                )
        return dict(zip(targets, versions, strict=True))

    def adapter(self, name: AdapterName) -> Adapter:
        """Raises NotFound."""
        return adapter_record(name, *self._state(name))

    def adapters(self, tenants: Sequence[str] | None, page_size: int, page_token: str) -> tuple[list[Adapter], str]:
        """A page by name, and the token of the next; the token is the last name of the page.

        tenants: whose, in order; None: everybody's
        """
        after = adapter_stream(parse_name(page_token, field="page_token")) if page_token else ""
        limit = page_limit(page_size)
        found: list[tuple[str, Stored]] = []
        for prefix in [ADAPTERS] if tenants is None else [f"{ADAPTERS}{tenant}/" for tenant in tenants]:
            if len(found) <= limit:
                found += self._index.scan(prefix, after, limit + 1 - len(found))
        page = [adapter_record(adapter_of(stream), *_decoded(stored)) for stream, stored in found[:limit]]
        return page, str(page[-1].name) if len(found) > limit else ""

    def version(self, adapter: AdapterName, number: int) -> Version:
        """One version with its modules, deleted or not. Raises NotFound."""
        state = self._state(adapter)[1]
        if state.version(number) is None:
            raise refusals.version_not_found(adapter, number, latest(state))
        return self._read(adapter, state, [number], with_modules=True)[0]

    def versions(
        self, adapter: AdapterName, *, include_deleted: bool, page_size: int, page_token: str
    ) -> tuple[list[Version], str]:
        """A page, newest first, and the token of the next; the token is the last number of the page."""
        before = int(check_token(page_token)) if page_token else None
        limit = page_limit(page_size)
        state = self._state(adapter)[1]
        newest = len(state.versions) if before is None else min(before - 1, len(state.versions))
        numbers = [n for n in range(newest, 0, -1) if include_deleted or state.versions[n - 1].live][: limit + 1]
        return self._read(adapter, state, numbers[:limit]), str(numbers[limit - 1]) if len(numbers) > limit else ""

    def usage(self, tenant: str) -> Usage:
        """What the tenant keeps; of an adapter that has not changed since the last time, nothing is read again."""
        adapters, total, prefix, after = 0, 0, f"{ADAPTERS}{tenant}/", ""
        while page := self._index.scan(prefix, after, MAX_PAGE):
            for stream, stored in page:
                kept = self._sizes.get(stream)
                if kept is None or kept[0] != stored.seq:
                    kept = self._sizes[stream] = stored.seq, self._size(stream, stored)
                adapters, total = adapters + (kept[1] > 0), total + kept[1]
            after = page[-1][0]
        return Usage(adapters, total)

    def _size(self, stream: str, stored: Stored) -> int:
        """Packed bytes of the versions that are not collected."""
        versions = AdapterState.from_json(stored.state).versions
        keys = [str(number) for number, version in enumerate(versions, 1) if not version.collected]
        documents = self._index.documents(stream, keys)
        return sum(int(json.loads(document)["pack_size"]) for document in documents.values())

    def has_pack(self, digest: str) -> bool:
        return self._index.has_pack(digest)

    def totals(self) -> Totals:
        return self._index.totals()

    def _state(self, name: AdapterName) -> tuple[int, AdapterState]:
        stored = self._index.get(adapter_stream(name))
        if stored is None:
            raise adapter_not_found(name)
        return _decoded(stored)

    def _read(
        self, adapter: AdapterName, state: AdapterState, numbers: list[int], *, with_modules: bool = False
    ) -> list[Version]:
        keys = [str(number) for number in numbers]
        wanted = [*keys, *map(modules_key, keys)] if with_modules else keys
        documents = self._index.documents(adapter_stream(adapter), wanted)
        versions = []
        for number, key in zip(numbers, keys, strict=True):
            fields = json.loads(documents[key])
            if with_modules:
                fields["modules"] = json.loads(documents[modules_key(key)])
            versions.append(version_record(adapter, state, number, content_of(fields)))
        return versions


def adapter_record(name: AdapterName, seq: int, state: AdapterState) -> Adapter:
    newest = latest(state)
    return Adapter(
        name=name,
        aliases=state.aliases,
        latest_version=newest,
        num_versions=len(state.live),
        base_model=state.versions[(newest or len(state.versions)) - 1].base_model,
        revision=seq,
    )


def version_record(adapter: AdapterName, state: AdapterState, number: int, content: VersionContent) -> Version:
    version = state.versions[number - 1]
    return Version(
        adapter=adapter,
        number=number,
        created_ns=version.created_ns,
        deleted=not version.live,
        aliases=state.aliases_of(number),
        content=content,
        collected=version.collected,
    )


def latest(state: AdapterState) -> int:
    """Number of the newest live version; 0 when there is none."""
    return max(state.live, default=0)


def check_live(adapter: AdapterName, state: AdapterState, number: int) -> int:
    """The number, when it is a live version's. Raises NotFound."""
    version = state.version(number)
    if version is None:
        raise refusals.version_not_found(adapter, number, latest(state))
    if not version.live:
        raise refusals.version_deleted(adapter, number)
    return number


def page_limit(page_size: int) -> int:
    return min(page_size or DEFAULT_PAGE, MAX_PAGE)


def check_token(page_token: str) -> str:
    """A page token that is a number. Raises InvalidArgument."""
    if not re.fullmatch(r"[1-9][0-9]{0,17}", page_token):
        raise InvalidArgument(
            "INVALID_PAGE_TOKEN", f"page_token: {shown(page_token)} is none of ours", field="page_token"
        )
    return page_token


def _meant(state: AdapterState, reference: AdapterReference) -> Sequence[Target]:
    if reference.version is not None:
        return [Target(reference.version)]
    if reference.alias == LATEST:
        newest = latest(state)
        if not newest:
            raise refusals.no_versions(reference.adapter)
        return [Target(newest)]
    targets = state.aliases.get(reference.alias)
    if targets is None:
        raise refusals.alias_not_found(reference.adapter, reference.alias, sorted(state.aliases))
    return targets


def _decoded(stored: Stored) -> tuple[int, AdapterState]:
    return stored.seq, AdapterState.from_json(stored.state)
