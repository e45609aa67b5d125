"""What names mean: versions, aliases, deletion, resolution and lists."""

from __future__ import annotations

from typing import Any

import pytest

from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    MultiloraError,
    NotFound,
)
from tests.adapter_store.conftest import Client
from tests.adapter_store.uploads import make_adapter


def register(client: Client, name: str, seed: int = 0, **fields: Any) -> int:
    return client.register(name, make_adapter(seed=seed), **fields).version.identity.version


def set_alias(client: Client, adapter: str, alias: str, *versions: int) -> Any:
    return client("SetAlias", adapter=adapter, alias=alias, targets=[{"version": version} for version in versions])


def test_versions_count_up_and_stable_stays(client: Client) -> None:
    assert [register(client, "acme/x", seed) for seed in range(3)] == [1, 2, 3]
    adapter = client("GetAdapter", adapter="acme/x").adapter
    assert (adapter.name, adapter.latest_version, adapter.num_versions) == ("acme/x", 3, 3)
    assert dict(adapter.aliases) == {"stable": 1}
    assert adapter.base_model == "tiny-llama"


def test_promote_moves_stable(client: Client) -> None:
    register(client, "x")
    register(client, "x", 1, promote=True)
    assert client.resolve("x").identity.version == 2
    again = client.register("x", make_adapter(), promote=True)
    assert again.existed
    assert list(again.version.aliases) == ["stable"]
    assert client.resolve("x").identity.version == 1


def test_same_content_is_one_version(client: Client) -> None:
    first = client.register("x", make_adapter())
    again = client.register("x", make_adapter())
    assert (first.existed, again.existed) == (False, True)
    assert again.version == first.version
    other = client.register("y", make_adapter())
    assert not other.existed
    assert other.version.identity.digest == first.version.identity.digest
    assert other.version.identity.pack_digest == first.version.identity.pack_digest


def test_overrides_and_base_are_part_of_the_content(client: Client) -> None:
    client.register_base_model("twin", accepted_names=["tiny-llama"])
    digests = {
        client.register("x", make_adapter()).version.identity.digest,
        client.register("x", make_adapter(), allow_zero=True).version.identity.digest,
        client.register("x", make_adapter(), base_model="twin").version.identity.digest,
    }
    assert len(digests) == 3


def test_deleted_numbers_are_never_used_again(client: Client) -> None:
    register(client, "x", 0)
    register(client, "x", 1)
    client("DeleteVersion", adapter="x", version=2)
    assert client("GetVersion", adapter="x", version=2).version.deleted
    assert client("GetAdapter", adapter="x").adapter.latest_version == 1
    again = client.register("x", make_adapter(seed=1))
    assert (again.existed, again.version.identity.version) == (False, 3)


def test_a_version_in_use_is_not_deleted(client: Client) -> None:
    register(client, "x")
    set_alias(client, "x", "canary", 1)
    with pytest.raises(FailedPrecondition, match="canary, stable") as caught:
        client("DeleteVersion", adapter="x", version=1)
    assert caught.value.reason == "VERSION_IN_USE"
    assert caught.value.metadata["aliases"] == "canary, stable"


@pytest.mark.parametrize(
    ("reference", "version"),
    [
        ("acme/x", 1),
        ("acme/x:stable", 1),
        ("acme/x@1", 1),
        ("acme/x@3", 3),
        ("acme/x:latest", 3),
        ("acme/x:canary", 3),
        ("x", 1),
        ("default/x:latest", 1),
    ],
)
def test_references_resolve(named: Client, reference: str, version: int) -> None:
    answer = named.resolve(reference, "tiny-llama")
    assert answer.identity.version == version
    assert answer.max_rank == 4
    assert answer.identity.adapter == ("acme/x" if reference.startswith("acme") else "default/x")


@pytest.mark.parametrize(
    ("reference", "reason", "told"),
    [
        ("acme/y", "ADAPTER_NOT_FOUND", "acme/y"),
        ("other/x", "ADAPTER_NOT_FOUND", "other/x"),
        ("acme/x@5", "VERSION_NOT_FOUND", "its newest is 3"),
        ("acme/x@2", "VERSION_DELETED", "version 2"),
        ("acme/x:beta", "ALIAS_NOT_FOUND", "canary, stable, latest"),
        ("acme/x:3", "ALIAS_NOT_FOUND", "x@3"),
        ("acme/x@999999999999999999", "VERSION_NOT_FOUND", "999999999999999999"),
    ],
)
def test_unknown_references_are_not_found(named: Client, reference: str, reason: str, told: str) -> None:
    with pytest.raises(NotFound) as caught:
        named.resolve(reference)
    assert caught.value.reason == reason
    assert told in caught.value.message


@pytest.mark.parametrize(
    "reference", ["", "X", "a/b/c", "x@", "x@0", "x@-1", "x@1:a", "x:", "x:A", "/x", "x/", "x" * 64]
)
def test_bad_references_are_invalid(named: Client, reference: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        named.resolve(reference)
    assert caught.value.field == "reference"


def test_another_base_model_is_refused(named: Client) -> None:
    with pytest.raises(FailedPrecondition, match="tiny-llama") as caught:
        named.resolve("acme/x", "another")
    assert caught.value.reason == "BASE_MODEL_MISMATCH"


@pytest.fixture
def named(client: Client) -> Client:
    """acme/x with versions 1, 2 (deleted) and 3 (canary); default/x with version 1."""
    for seed in range(3):
        register(client, "acme/x", seed)
    set_alias(client, "acme/x", "canary", 3)
    client("DeleteVersion", adapter="acme/x", version=2)
    register(client, "x")
    return client


def test_latest_of_nothing_is_not_found(client: Client) -> None:
    """`stable` holds version 1 for as long as aliases cannot be deleted, so latest always has something."""
    register(client, "x")
    register(client, "x", 1, promote=True)
    client("DeleteVersion", adapter="x", version=1)
    assert client.resolve("x:latest").identity.version == 2


@pytest.mark.parametrize(
    ("alias", "versions", "kind", "reason"),
    [
        ("latest", [1], InvalidArgument, "ALIAS_RESERVED"),
        ("3", [1], InvalidArgument, "INVALID_ALIAS"),
        ("Canary", [1], InvalidArgument, "INVALID_NAME"),
        ("", [1], InvalidArgument, "INVALID_NAME"),
        ("canary", [], InvalidArgument, "MISSING_FIELD"),
        ("canary", [0], InvalidArgument, "MISSING_FIELD"),
        ("canary", [1, 3], InvalidArgument, "INVALID_WEIGHT"),
        ("canary", [9], NotFound, "VERSION_NOT_FOUND"),
        ("canary", [2**64 - 1], NotFound, "VERSION_NOT_FOUND"),
        ("canary", [2], NotFound, "VERSION_DELETED"),
    ],
)
def test_aliases_that_may_not_be(
    named: Client, alias: str, versions: list[int], kind: type[MultiloraError], reason: str
) -> None:
    with pytest.raises(kind) as caught:
        set_alias(named, "acme/x", alias, *versions)
    assert caught.value.reason == reason
    assert dict(named("GetAdapter", adapter="acme/x").adapter.aliases) == {"stable": 1, "canary": 3}


def test_aliases_move(named: Client) -> None:
    assert dict(set_alias(named, "acme/x", "stable", 3).adapter.aliases) == {"stable": 3, "canary": 3}
    assert list(named("GetVersion", adapter="acme/x", version=3).version.aliases) == ["canary", "stable"]
    named("DeleteVersion", adapter="acme/x", version=1)


def test_adapters_and_base_models_share_no_name(client: Client) -> None:
    with pytest.raises(AlreadyExists, match="tiny-llama") as caught:
        register(client, "acme/tiny-llama")
    assert caught.value.reason == "NAME_TAKEN"
    register(client, "acme/x")
    with pytest.raises(AlreadyExists, match="acme/x") as caught:
        client.register_base_model("x")
    assert caught.value.reason == "NAME_TAKEN"


def test_base_models_are_registered_once(client: Client) -> None:
    again = client.register_base_model(accepted_names=["org/Tiny-Llama"])
    assert again.existed
    assert [module.name for module in again.profile.modules][6:8] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert [profile.name for profile in client("ListBaseModels").base_models] == ["tiny-llama"]
    assert client("ListBaseModels").base_models[0] == again.profile


def test_a_profile_may_widen_and_nothing_else(client: Client) -> None:
    names = ["org/Tiny-Llama", "another"]
    assert not client.register_base_model(accepted_names=names, max_lora_rank=16).existed
    assert client.register_base_model(accepted_names=names, max_lora_rank=16).existed
    assert client("ListBaseModels").base_models[0].max_lora_rank == 16
    for fields in ({"max_lora_rank": 8, "accepted_names": names}, {"max_lora_rank": 16}):
        with pytest.raises(AlreadyExists, match=r"max_lora_rank|accepted_names") as caught:
            client.register_base_model(**fields)
        assert caught.value.reason == "BASE_MODEL_EXISTS"


@pytest.mark.parametrize(
    ("adapter", "base_model", "kind", "reason"),
    [
        ("x", "unknown", NotFound, "BASE_MODEL_NOT_FOUND"),
        ("x", "", InvalidArgument, "MISSING_FIELD"),
        ("", "tiny-llama", InvalidArgument, "INVALID_NAME"),
        ("X", "tiny-llama", InvalidArgument, "INVALID_NAME"),
        ("x@1", "tiny-llama", InvalidArgument, "INVALID_NAME"),
        ("x:a", "tiny-llama", InvalidArgument, "INVALID_NAME"),
    ],
)
def test_headers_that_are_refused(
    client: Client, adapter: str, base_model: str, kind: type[MultiloraError], reason: str
) -> None:
    with pytest.raises(kind) as caught:
        client.register(adapter, make_adapter(), base_model=base_model)
    assert caught.value.reason == reason


def test_adapters_are_paged_by_name(client: Client) -> None:
    names = ["acme/b", "acme/a", "zeta/a", "c", "acme/c"]
    for name in names:
        register(client, name)
    listed, token, pages = [], "", 0
    while pages == 0 or token:
        page = client("ListAdapters", page_size=2, page_token=token)
        listed += [adapter.name for adapter in page.adapters]
        token, pages = page.next_page_token, pages + 1
    assert (listed, pages) == (["acme/a", "acme/b", "acme/c", "default/c", "zeta/a"], 3)
    acme = client("ListAdapters", tenant="acme", page_size=3)
    assert ([adapter.name for adapter in acme.adapters], acme.next_page_token) == (listed[:3], "")
    with pytest.raises(InvalidArgument, match="page_token"):
        client("ListAdapters", page_token="../..")
    with pytest.raises(InvalidArgument, match="tenant"):
        client("ListAdapters", tenant="A")


def test_versions_are_paged_newest_first(client: Client) -> None:
    for seed in range(5):
        register(client, "x", seed)
    client("DeleteVersion", adapter="x", version=3)
    first = client("ListVersions", adapter="x", page_size=3)
    assert [version.identity.version for version in first.versions] == [5, 4, 2]
    assert not first.versions[0].modules
    second = client("ListVersions", adapter="x", page_size=3, page_token=first.next_page_token)
    assert ([version.identity.version for version in second.versions], second.next_page_token) == ([1], "")
    every = client("ListVersions", adapter="x", include_deleted=True)
    assert [(version.identity.version, version.deleted) for version in every.versions][2] == (3, True)
    with pytest.raises(InvalidArgument, match="page_token"):
        client("ListVersions", adapter="x", page_token="x")
    with pytest.raises(NotFound, match="ADAPTER_NOT_FOUND"):
        client("ListVersions", adapter="y")


def test_stats_count_what_lives(client: Client) -> None:
    register(client, "x")
    register(client, "x", 1)
    register(client, "y")
    client("DeleteVersion", adapter="x", version=2)
    stats = client("GetStats")
    assert (stats.adapters, stats.versions, stats.base_models) == (2, 2, 1)
    assert stats.blob_bytes > 0
