"""The fold of a log, against a plain model of it; and that what does not fit is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.adapter_store.log.entry import (
    FORMAT,
    AliasDeleted,
    AliasSet,
    BaseModelSet,
    Body,
    Entry,
    VersionAdded,
    VersionCollected,
    VersionDeleted,
    VersionUndeleted,
    decode,
    encode,
)
from services.adapter_store.log.fold import AdapterState, fold_adapter, fold_base_model
from services.adapter_store.records import BoundModule, VersionContent
from services.common.errors import DataLoss
from services.common.profile import BaseModelProfile, Shape
from services.common.split import Target

PROFILE = BaseModelProfile("tiny", "LlamaForCausalLM", 1, 8, {"model.layers.0.q": Shape(2, 2)}, ("tiny",))


def content(number: int) -> VersionContent:
    digest = f"sha256:{number:064x}"
    modules = (BoundModule("model.layers.0.q", 1, 0.1),)
    return VersionContent(digest, digest, digest, digest, 1, "tiny", 1, 4, "float32", ("mind",), modules)


class Model:
    """Says what fits and what is then true, without folding."""

    def __init__(self) -> None:
        self.versions: dict[int, str] = {}
        self.aliases: dict[str, set[int]] = {}

    def take(self, body: Body) -> bool:
        """Apply a change; False, and nothing, when it does not fit."""
        if isinstance(body, VersionAdded):
            if body.number != len(self.versions) + 1:
                return False
            self.versions[body.number] = "live"
            if body.stable:
                self.aliases["stable"] = {body.number}
        elif isinstance(body, AliasSet):
            targets = {target.version for target in body.targets}
            if not targets or any(self.versions.get(number) != "live" for number in targets):
                return False
            self.aliases[body.alias] = targets
        elif isinstance(body, AliasDeleted):
            return self.aliases.pop(body.alias, None) is not None
        elif isinstance(body, VersionDeleted):
            if any(body.number in targets for targets in self.aliases.values()):
                return False
            return self._step(body.number, "live", "deleted")
        elif isinstance(body, VersionUndeleted):
            return self._step(body.number, "deleted", "live")
        elif isinstance(body, VersionCollected):
            return self._step(body.number, "deleted", "collected")
        return True

    def _step(self, number: int, before: str, after: str) -> bool:
        if self.versions.get(number) != before:
            return False
        self.versions[number] = after
        return True


numbers = st.integers(0, 5)
aliases = st.sampled_from(["stable", "canary"])
targets = st.lists(st.builds(Target, numbers, st.integers(1, 9)), max_size=3, unique_by=lambda target: target.version)
bodies: st.SearchStrategy[Body] = st.one_of(
    numbers.flatmap(lambda n: st.builds(VersionAdded, st.just(n), st.just(content(n)), st.booleans())),
    st.builds(AliasSet, aliases, targets.map(tuple)),
    st.builds(AliasDeleted, aliases),
    st.builds(VersionDeleted, numbers),
    st.builds(VersionUndeleted, numbers),
    st.builds(VersionCollected, numbers),
)


@given(st.lists(bodies, max_size=40))
def test_the_fold_agrees_with_a_model(changes: list[Body]) -> None:
    model, state = Model(), AdapterState()
    for at, body in enumerate(changes):
        entry = decode(encode(Entry(body, at, "who")), "here")
        assert entry.body == body
        if not model.take(body):
            with pytest.raises(DataLoss, match="LOG_INCONSISTENT"):
                fold_adapter(state, entry)
            continue
        state = fold_adapter(state, entry)
        assert AdapterState.from_json(state.to_json()) == state
        assert len(state.versions) == len(model.versions)
        assert state.live == [number for number, is_ in model.versions.items() if is_ == "live"]
        assert [v.collected for v in state.versions] == [is_ == "collected" for is_ in model.versions.values()]
        assert {alias: {t.version for t in to} for alias, to in state.aliases.items()} == model.aliases
        for number in state.live:
            assert state.versions[number - 1].content_digest == content(number).content_digest
            assert set(state.aliases_of(number)) == {alias for alias, to in model.aliases.items() if number in to}


def test_base_models_fold_to_the_last_profile() -> None:
    entry = Entry(BaseModelSet(PROFILE), 5)
    assert fold_base_model(decode(encode(entry), "here")) == PROFILE
    with pytest.raises(DataLoss, match="no base model's"):
        fold_base_model(Entry(AliasDeleted("x"), 5))
    with pytest.raises(DataLoss, match="no adapter's"):
        fold_adapter(AdapterState(), entry)


@pytest.mark.parametrize(
    "change",
    [{"format": FORMAT + 1}, {"kind": "moon"}, {"kind": "version"}, {"at_ns": None, "id": None, "format": "1"}],
)
def test_unknown_entries_are_refused(change: dict[str, Any]) -> None:
    fields = json.loads(encode(Entry(AliasDeleted("x"), 5))) | change
    with pytest.raises(DataLoss, match="adapters/acme/x/3"):
        decode(json.dumps(fields).encode(), "adapters/acme/x/3")


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    with pytest.raises(DataLoss):
        decode(data, "here")
