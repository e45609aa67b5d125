"""Aliases: weighted, moved by expected revision, deleted; and the history of it all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from multilora.common.v1 import common_pb2
from services.common.errors import FailedPrecondition, InvalidArgument, MultiloraError, NotFound
from services.common.split import Target, pick
from tests.adapter_store.conftest import Client
from tests.adapter_store.uploads import make_adapter


@pytest.fixture
def three(client: Client) -> Client:
    """acme/x with versions 1, 2, 3; stable is 1."""
    for seed in range(3):
        client.register("acme/x", make_adapter(seed=seed))
    return client


def set_alias(client: Client, alias: str, *targets: tuple[int, int], **fields: Any) -> Any:
    messages = [{"version": version, "weight": weight} for version, weight in targets]
    return client("SetAlias", adapter="acme/x", alias=alias, targets=messages, **fields).adapter


def test_a_weighted_alias_sticks_to_its_keys(three: Client) -> None:
    adapter = set_alias(three, "stable", (3, 1), (1, 9))
    assert adapter.aliases["stable"] == 1
    assert [(t.version, t.weight) for t in adapter.alias_targets[0].targets] == [(1, 9), (3, 1)]
    targets = [Target(1, 9), Target(3, 1)]
    for number in range(40):
        key = f"user-{number}"
        met = three.resolve("acme/x", routing_key=key).identity.version
        assert met == pick(targets, "acme/x:stable", key)
    assert three.resolve("acme/x").identity.version in {1, 3}
    assert list(three("GetVersion", adapter="acme/x", version=3).version.aliases) == ["stable"]
    with pytest.raises(FailedPrecondition, match="VERSION_IN_USE"):
        three("DeleteVersion", adapter="acme/x", version=3)


@pytest.mark.parametrize(
    ("targets", "kind", "reason"),
    [
        ([(1, 1), (1, 2)], InvalidArgument, "DUPLICATE_TARGET"),
        ([(1, 1), (2, 0)], InvalidArgument, "INVALID_WEIGHT"),
        ([(1, 1), (9, 1)], NotFound, "VERSION_NOT_FOUND"),
        ([(number, 1) for number in range(1, 18)], InvalidArgument, "TOO_MANY_TARGETS"),
    ],
)
def test_targets_that_may_not_be(
    three: Client, targets: list[tuple[int, int]], kind: type[MultiloraError], reason: str
) -> None:
    with pytest.raises(kind) as caught:
        set_alias(three, "canary", *targets)
    assert caught.value.reason == reason


def test_an_expected_revision_keeps_pipelines_apart(three: Client) -> None:
    revision = three("GetAdapter", adapter="acme/x").adapter.revision
    assert revision == 3
    assert set_alias(three, "stable", (2, 1), expected_revision=revision).revision == revision + 1
    with pytest.raises(FailedPrecondition, match="revision 4, not 3") as caught:
        set_alias(three, "stable", (3, 1), expected_revision=revision)
    assert (caught.value.reason, caught.value.field) == ("REVISION_CONFLICT", "expected_revision")
    with pytest.raises(FailedPrecondition, match="REVISION_CONFLICT"):
        three("DeleteAlias", adapter="acme/x", alias="stable", expected_revision=0)
    assert three.resolve("acme/x").identity.version == 2


def test_of_many_movers_with_one_revision_one_wins(three: Client) -> None:
    def move(number: int) -> int:
        try:
            return int(set_alias(three, f"a{number}", (1, 1), expected_revision=3).revision)
        except FailedPrecondition:
            return 0

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(move, range(6))) == [0, 0, 0, 0, 0, 4]


def test_the_same_move_again_is_no_change(three: Client) -> None:
    first = set_alias(three, "canary", (2, 5))
    assert set_alias(three, "canary", (2, 1)).revision == first.revision


def test_aliases_are_deleted(three: Client) -> None:
    set_alias(three, "canary", (2, 1))
    answer = three("DeleteAlias", adapter="acme/x", alias="canary")
    assert dict(answer.adapter.aliases) == {"stable": 1}
    with pytest.raises(NotFound, match="ALIAS_NOT_FOUND"):
        three("DeleteAlias", adapter="acme/x", alias="canary")
    with pytest.raises(InvalidArgument, match="ALIAS_RESERVED"):
        three("DeleteAlias", adapter="acme/x", alias="latest")
    with pytest.raises(NotFound, match="ADAPTER_NOT_FOUND"):
        three("DeleteAlias", adapter="acme/y", alias="canary")


def test_stable_goes_last(three: Client) -> None:
    with pytest.raises(FailedPrecondition, match="2, 3") as caught:
        three("DeleteAlias", adapter="acme/x", alias="stable")
    assert caught.value.reason == "STABLE_IN_USE"
    for version in (2, 3):
        three("DeleteVersion", adapter="acme/x", version=version)
    three("DeleteAlias", adapter="acme/x", alias="stable")
    three("DeleteVersion", adapter="acme/x", version=1)
    adapter = three("GetAdapter", adapter="acme/x").adapter
    assert (adapter.latest_version, adapter.num_versions, dict(adapter.aliases)) == (0, 0, {})
    for reference in ("acme/x", "acme/x:latest", "acme/x@1"):
        with pytest.raises(NotFound):
            three.resolve(reference)
    assert three("GetStats").adapters == 0
    assert three.register("acme/x", make_adapter(seed=9)).version.identity.version == 4
    with pytest.raises(NotFound, match="ALIAS_NOT_FOUND"):  # no upload is live by accident
        three.resolve("acme/x")


def test_history_says_who_and_what(three: Client) -> None:
    set_alias(three, "stable", (1, 9), (2, 1), actor="pipeline-7")
    three("DeleteVersion", adapter="acme/x", version=3, actor="jane")
    three.register("acme/x", make_adapter(seed=1), promote=True)
    entries = three("GetHistory", adapter="acme/x").entries
    assert [(entry.revision, entry.actor) for entry in entries] == [
        (6, ""), (5, "jane"), (4, "pipeline-7"), (3, ""), (2, ""), (1, "")
    ]  # fmt: skip
    kinds = [common_pb2.ChangeKind.Name(entry.kind).removeprefix("CHANGE_KIND_") for entry in entries]
    assert kinds == ["ALIAS", "VERSION_DELETED", "ALIAS", "VERSION", "VERSION", "VERSION"]
    assert [(t.version, t.weight) for t in entries[2].targets] == [(1, 9), (2, 1)]
    assert (entries[1].version, entries[3].version, entries[3].alias) == (3, 3, "")
    assert (entries[5].version, entries[5].alias, entries[5].targets[0].version) == (1, "stable", 1)
    times = [entry.changed_at.ToNanoseconds() for entry in entries]
    assert times == sorted(times, reverse=True)


def test_history_is_paged(three: Client) -> None:
    first = three("GetHistory", adapter="acme/x", page_size=2)
    assert [entry.revision for entry in first.entries] == [3, 2]
    second = three("GetHistory", adapter="acme/x", page_size=2, page_token=first.next_page_token)
    assert ([entry.revision for entry in second.entries], second.next_page_token) == ([1], "")
    with pytest.raises(InvalidArgument, match="page_token"):
        three("GetHistory", adapter="acme/x", page_token="-1")
    with pytest.raises(NotFound, match="ADAPTER_NOT_FOUND"):
        three("GetHistory", adapter="acme/y")


def test_an_actor_that_no_history_could_show_is_refused(three: Client) -> None:
    with pytest.raises(InvalidArgument, match="INVALID_ACTOR"):
        three("DeleteVersion", adapter="acme/x", version=3, actor="a" * 129)
