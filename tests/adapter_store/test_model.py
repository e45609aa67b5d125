"""Any sequence of operations, by two stores on one place, against a plain model of what must then be true."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.adapter_store.store import AdapterStore
from services.common.errors import FailedPrecondition, MultiloraError, NotFound
from services.common.profile import profile_from_config
from services.common.references import parse_reference
from services.common.split import Target
from tests.adapter_store import uploads
from tests.adapter_store.killed import NAME, open_store, register

seeds, numbers, which = st.integers(0, 4), st.integers(1, 6), st.booleans()
LIVE, DELETED, COLLECTED = "live", "deleted", "collected"


class StoreMachine(RuleBasedStateMachine):
    """The model: what each version was made from and is now, and what each alias points to."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        data = str(Path(self._directory.name) / "data")
        self._places = {"blobs": data, "staging": data, "endpoint_url": "", "index": f"{data}/index.sqlite3"}
        self._stores = [open_store(self._places) for _ in range(2)]
        profile = profile_from_config(uploads.BASE_MODEL, json.dumps(uploads.MODEL_CONFIG), max_lora_rank=8)
        self._stores[0].changes.register_base_model(profile)
        self._seeds: list[int] = []
        self._states: list[str] = []
        self._aliases: dict[str, set[int]] = {}
        self._epoch = self._stores[0].journal.index.position().epoch

    def teardown(self) -> None:
        for store in self._stores:
            store.close()
        self._directory.cleanup()

    def _store(self, second: bool) -> AdapterStore:
        return self._stores[second]

    def _live(self, number: int) -> bool:
        return number <= len(self._states) and self._states[number - 1] == LIVE

    def _used(self, number: int) -> bool:
        return any(number in targets for targets in self._aliases.values())

    @rule(second=which, seed=seeds, promote=st.booleans())
    def register(self, second: bool, seed: int, promote: bool) -> None:
        answer = register(self._store(second), seed, promote=promote)
        known = [n for n, made in enumerate(self._seeds, 1) if made == seed and self._live(n)]
        assert answer.existed == bool(known)
        if not known:
            self._seeds.append(seed)
            self._states.append(LIVE)
        number = known[0] if known else len(self._seeds)
        assert answer.version.number == number
        if promote or (number == len(self._seeds) == 1 and not known):
            self._aliases["stable"] = {number}

    @rule(second=which, alias=st.sampled_from(["stable", "canary"]), first=numbers, other=numbers)
    def set_alias(self, second: bool, alias: str, first: int, other: int) -> None:
        targets = [Target(number, 3) for number in sorted({first, other})]
        try:
            self._store(second).changes.set_alias(NAME, alias, targets)
        except NotFound:
            assert not (self._live(first) and self._live(other))
        else:
            assert self._live(first) and self._live(other)
            self._aliases[alias] = {first, other}

    @precondition(lambda self: self._aliases)
    @rule(second=which, alias=st.sampled_from(["stable", "canary"]))
    def delete_alias(self, second: bool, alias: str) -> None:
        live = {number for number in range(1, len(self._states) + 1) if self._live(number)}
        targets = self._aliases.get(alias)
        try:
            self._store(second).changes.delete_alias(NAME, alias)
        except MultiloraError:
            assert targets is None or (alias == "stable" and live - targets)
        else:
            assert targets is not None
            assert alias != "stable" or live == targets
            del self._aliases[alias]

    @rule(second=which, number=numbers)
    def delete_version(self, second: bool, number: int) -> None:
        try:
            self._store(second).changes.delete_version(NAME, number)
        except MultiloraError:
            assert not self._live(number) or self._used(number)
        else:
            assert self._live(number)
            assert not self._used(number)
            self._states[number - 1] = DELETED

    @rule(second=which, number=numbers)
    def undelete_version(self, second: bool, number: int) -> None:
        try:
            self._store(second).changes.undelete_version(NAME, number)
        except NotFound:
            assert number > len(self._states)
        except FailedPrecondition as error:
            expected = "CONTENT_LIVES" if self._states[number - 1] == DELETED else "VERSION_COLLECTED"
            assert error.reason == expected  # noqa: PT017 -- which error it is depends on what was done before
        else:
            self._states[number - 1] = LIVE

    @rule(second=which)
    def collect(self, second: bool) -> None:
        self._store(second).collection.collect(dry_run=False)
        self._states = [COLLECTED if state == DELETED else state for state in self._states]
        needed = {seed for seed, state in zip(self._seeds, self._states, strict=True) if state == LIVE}
        assert len(list(self._store(second).blobs.list())) == len(needed) + 2 * bool(needed)

    @rule(second=which)
    def reindex(self, second: bool) -> None:
        self._store(second).journal.rebuild()

    @rule(second=which)
    def restart(self, second: bool) -> None:
        self._store(second).close()
        self._stores[second] = open_store(self._places)
        self._stores[second].heal()

    @invariant()
    def both_stores_say_what_the_model_says(self) -> None:
        for store in self._stores if self._seeds else ():
            adapter = store.catalog.adapter(NAME)
            assert {alias: {t.version for t in to} for alias, to in adapter.aliases.items()} == self._aliases
            versions, _ = store.catalog.versions(NAME, include_deleted=True, page_size=0, page_token="")
            states = [COLLECTED if v.collected else DELETED if v.deleted else LIVE for v in reversed(versions)]
            assert states == self._states
            for alias, targets in self._aliases.items():
                reference = parse_reference(f"{NAME}:{alias}")
                assert {version.number for version in store.catalog.resolve(reference).values()} == targets
        assert self._stores[0].verify().problems == []


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
