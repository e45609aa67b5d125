"""Moves of aliases, deletions, and base models: each a decision on the last state, then one entry of a log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict

from services.adapter_store import refusals
from services.adapter_store.catalog import adapter_record, check_live
from services.adapter_store.index.interface import Index
from services.adapter_store.journal import Folded, Journal
from services.adapter_store.log.entry import (
    AliasDeleted,
    AliasSet,
    BaseModelSet,
    Body,
    VersionDeleted,
    VersionUndeleted,
)
from services.adapter_store.log.fold import AdapterState
from services.adapter_store.records import Adapter
from services.adapter_store.streams import adapter_of, adapter_stream, base_model_stream
from services.common.auth.callers import adapter_not_found
from services.common.errors import InvalidArgument
from services.common.profile import BaseModelProfile
from services.common.references import LATEST, STABLE, AdapterName, check_name
from services.common.split import Target

Decide = Callable[[Folded], Body | None]

log = logging.getLogger(__name__)


class Changes:
    """Every change but a registration. `actor` is who asked for it and stands in the log."""

    def __init__(self, journal: Journal, index: Index) -> None:
        self._journal = journal
        self._index = index

    def register_base_model(self, profile: BaseModelProfile, *, actor: str = "") -> bool:
        """True when the same profile was there; a higher max_lora_rank and more accepted_names are taken as an update.

        Raises AlreadyExists for other differences, and for an adapter's name.
        """
        existed = False

        def decide(folded: Folded) -> Body | None:
            nonlocal existed
            known = folded.state
            existed = known == profile
            if existed:
                return None
            if isinstance(known, BaseModelProfile):
                _check_update(known, profile)
            elif taken := self._index.named(profile.name):
                raise refusals.named_like_adapter(profile.name, adapter_of(taken))
            return BaseModelSet(profile)

        self._journal.commit(base_model_stream(profile.name), decide, actor=actor)
        log.info("base model %s registered, existed=%s", profile.name, existed)
        return existed

    def set_alias(
        self,
        adapter: AdapterName,
        alias: str,
        targets: Sequence[Target],
        *,
        expected_revision: int | None = None,
        actor: str = "",
    ) -> Adapter:
        """Point an alias at one version, or at several by weight. Raises InvalidArgument, NotFound,
        and FailedPrecondition when the adapter is not at `expected_revision`.
        """
        _check_alias(alias)
        wanted = tuple(sorted(targets))

        def decide(folded: Folded) -> Body | None:
            state = _existing(adapter, folded, expected_revision)
            for target in wanted:
                check_live(adapter, state, target.version)
            return None if state.aliases.get(alias) == wanted else AliasSet(alias, wanted)

        moved = self._commit(adapter, decide, actor)
        log.info("alias %s:%s -> %s", adapter, alias, ", ".join(f"{t.version} ({t.weight})" for t in wanted))
        return moved

    def delete_alias(
        self, adapter: AdapterName, alias: str, *, expected_revision: int | None = None, actor: str = ""
    ) -> Adapter:
        """Remove an alias. `stable` may go only when no version lives but those it points to: an adapter that is
        retired. Raises InvalidArgument, NotFound, FailedPrecondition.
        """
        _check_alias(alias)

        def decide(folded: Folded) -> Body | None:
            state = _existing(adapter, folded, expected_revision)
            targets = state.aliases.get(alias)
            if targets is None:
                raise refusals.alias_not_found(adapter, alias, sorted(state.aliases))
            others = set(state.live) - {target.version for target in targets}
            if alias == STABLE and others:
                raise refusals.stable_in_use(adapter, sorted(others))
            return AliasDeleted(alias)

        changed = self._commit(adapter, decide, actor)
        log.info("alias %s:%s deleted", adapter, alias)
        return changed

    def delete_version(self, adapter: AdapterName, number: int, *, actor: str = "") -> None:
        """Delete a version that no alias points to; it can be brought back until it is collected.

        Raises NotFound, and FailedPrecondition that names the aliases.
        """

        def decide(folded: Folded) -> Body | None:
            state = _existing(adapter, folded)
            check_live(adapter, state, number)
            if aliases := state.aliases_of(number):
                raise refusals.version_in_use(adapter, number, aliases)
            return VersionDeleted(number)

        self._commit(adapter, decide, actor)
        log.info("deleted %s@%d", adapter, number)

    def undelete_version(self, adapter: AdapterName, number: int, *, actor: str = "") -> None:
        """Bring a deleted version back; of one that lives nothing changes.

        Raises NotFound, and FailedPrecondition when it was collected or another version has its content by now.
        """

        def decide(folded: Folded) -> Body | None:
            state = _existing(adapter, folded)
            version = state.version(number)
            if version is None or version.live:
                check_live(adapter, state, number)
                return None
            if version.collected:
                raise refusals.version_collected(adapter, number)
            other = state.with_content(version.content_digest)
            if other is not None:
                raise refusals.content_lives(adapter, number, other)
            return VersionUndeleted(number)

        self._commit(adapter, decide, actor)
        log.info("undeleted %s@%d", adapter, number)

    def _commit(self, adapter: AdapterName, decide: Decide, actor: str) -> Adapter:
        folded = self._journal.commit(adapter_stream(adapter), decide, actor=actor)
        assert isinstance(folded.state, AdapterState)
        return adapter_record(adapter, folded.seq, folded.state)


def _existing(adapter: AdapterName, folded: Folded, expected_revision: int | None = None) -> AdapterState:
    if folded.seq == 0:
        raise adapter_not_found(adapter)
    if expected_revision is not None and folded.seq != expected_revision:
        raise refusals.revision_conflict(adapter, expected_revision, folded.seq)
    assert isinstance(folded.state, AdapterState)
    return folded.state


def _check_alias(alias: str) -> None:
    check_name(alias, field="alias", what="alias")
    if alias == LATEST:
        raise InvalidArgument(
            "ALIAS_RESERVED", "alias: latest is the newest version, always; choose another", field="alias"
        )
    if alias.isdigit():
        raise InvalidArgument(
            "INVALID_ALIAS", f"alias: {alias!r} looks like a version; put a letter into it", field="alias"
        )


def _check_update(known: BaseModelProfile, profile: BaseModelProfile) -> None:
    """Raise AlreadyExists unless every upload that the known profile passed passes the new one too."""
    old, new = asdict(known), asdict(profile)
    widened = {
        "max_lora_rank": profile.max_lora_rank > known.max_lora_rank,
        "accepted_names": set(profile.accepted_names) >= set(known.accepted_names),
    }
    differs = [key for key in new if new[key] != old[key] and not widened.get(key, False)]
    if differs:
        raise refusals.base_model_differs(profile.name, differs)
