"""A replica follows the store's Watch: moved aliases, weights, promotions, deletions, a store that comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from multilora.adapter_store.v1 import admin_pb2
from services.common.errors import FailedPrecondition, NotFound, Unavailable
from services.common.profile import Shape, check_profile, profile_from_config
from services.common.split import Target, pick
from services.inference.engine.request import AdapterVersion
from services.inference.resolver import FRESH_SECONDS, Meaning, Resolver
from tests.assets.random_adapter import make_random_adapter
from tests.clients import failure, generate, request
from tests.conftest import TINY_BASE, InferenceServer, StoreProcess, inference_config, run_inference, run_store

NAME = "acme/helper"


@dataclass
class Pair:
    store: StoreProcess
    server: InferenceServer
    data_dir: Path

    def point(self, alias: str, **weights: int) -> None:
        targets = [
            admin_pb2.WeightedVersion(version=int(version[1:]), weight=weight) for version, weight in weights.items()
        ]
        self.store.admin().SetAlias(admin_pb2.SetAliasRequest(adapter=NAME, alias=alias, targets=targets))

    def version(self, reference: str = NAME, routing_key: str = "") -> int:
        """The version that answers right now."""
        asked = request([5, 6, 7], adapter=reference, max_tokens=1, routing_key=routing_key)
        return generate(self.server.address, asked).started.version

    def tiers(self) -> dict[int, str]:
        return {resident.adapter.version: resident.tier for resident in self.server.stats().adapters}


@pytest.fixture
def pair(tiny_model: Path, tmp_path: Path) -> Iterator[Pair]:
    """A store with two versions of one adapter, `stable` = 1, and a replica that watches it."""
    with run_store(tmp_path / "store") as store:
        store.register_base(TINY_BASE, (tiny_model / "config.json").read_text())
        for seed in (1, 2):
            made = make_random_adapter(tmp_path / str(seed), tiny_model, seed=seed, base_model_name_or_path=TINY_BASE)
            store.register(NAME, made, TINY_BASE)
        config = inference_config(tiny_model, tmp_path / "replica", adapter_store=store.address, threads=1)
        with run_inference(config) as server:
            pair = Pair(store, server, tmp_path / "replica")
            until(lambda: server.serving.resolver.snapshot_age < FRESH_SECONDS)
            yield pair


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again, as a person would; fails after a minute."""
    for _ in range(1200):
        if condition():
            return
        asyncio.run(asyncio.sleep(0.05))
    raise AssertionError("it never came true")


def test_a_moved_alias_is_followed_and_its_version_fetched_before_it_is_asked_for(pair: Pair) -> None:
    assert pair.version() == 1
    pair.point("stable", v2=1)
    until(lambda: pair.tiers().get(2) == "CPU")
    assert pair.version() == 2
    pair.point("stable", v1=1)
    until(lambda: pair.version() == 1)


def test_names_nobody_asked_for_are_not_fetched(pair: Pair) -> None:
    pair.point("canary", v2=1)
    assert pair.version() == 1
    pair.point("canary", v1=1)
    assert pair.version("acme/helper:canary") == 1
    assert set(pair.tiers()) == {1}


def test_weights_pick_as_the_store_does(pair: Pair) -> None:
    targets = [Target(1, 2), Target(2, 1)]
    expected = {f"key-{key}": pick(targets, f"{NAME}:stable", f"key-{key}") for key in range(40)}
    moved = next(key for key, version in expected.items() if version == 2)
    pair.point("stable", v1=2, v2=1)
    until(lambda: pair.version(routing_key=moved) == 2)
    assert {key: pair.version(routing_key=key) for key in expected} == expected


def test_a_deleted_version_is_dropped(pair: Pair) -> None:
    assert pair.version() == 1
    pair.point("stable", v2=1)
    until(lambda: pair.version() == 2)
    assert pair.tiers()[1] in ("CPU", "GPU")
    pair.store.admin().DeleteVersion(admin_pb2.DeleteVersionRequest(adapter=NAME, version=1))
    until(lambda: pair.tiers()[1] == "STORE")
    error = failure(pair.server.address, request([5, 6, 7], adapter=f"{NAME}@1"))
    assert isinstance(error, NotFound)
    assert error.reason == "VERSION_DELETED"
    assert pair.version() == 2


def test_a_store_that_was_away_is_followed_again(tiny_model: Path, tmp_path: Path) -> None:
    with run_store(tmp_path / "store") as first:
        first.register_base(TINY_BASE, (tiny_model / "config.json").read_text())
        made = make_random_adapter(tmp_path / "1", tiny_model, seed=1, base_model_name_or_path=TINY_BASE)
        first.register(NAME, made, TINY_BASE)
        port = first.address.rsplit(":", 1)[1]
        config = inference_config(tiny_model, tmp_path / "replica", adapter_store=first.address, threads=1)
        with run_inference(config) as server:
            pair = Pair(first, server, tmp_path / "replica")
            assert pair.version() == 1
            first.process.terminate()
            first.process.wait(timeout=20)
            assert pair.version() == 1, "a resident adapter serves on"
            other = make_random_adapter(tmp_path / "2", tiny_model, seed=2, base_model_name_or_path=TINY_BASE)
            with run_store(tmp_path / "store", "--port", port) as second:
                second.register(NAME, other, TINY_BASE, promote=True)
                until(lambda: pair.version() == 2)


def test_a_replica_below_its_profile_does_not_start(tiny_model: Path, tmp_path: Path) -> None:
    with run_store(tmp_path / "store") as store:
        store.register_base(TINY_BASE, (tiny_model / "config.json").read_text(), max_lora_rank=32)
        config = inference_config(tiny_model, tmp_path / "replica", adapter_store=store.address, max_lora_rank=16)
        with pytest.raises(FailedPrecondition, match="--max-lora-rank is 16") as caught, run_inference(config):
            pass
        assert caught.value.reason == "BELOW_PROFILE"


def test_another_model_under_the_name_does_not_start(tiny_model: Path, tmp_path: Path) -> None:
    with run_store(tmp_path / "store") as store:
        config_json = (
            (tiny_model / "config.json").read_text().replace('"intermediate_size": 256', '"intermediate_size": 512')
        )
        assert "512" in config_json
        store.register_base(TINY_BASE, config_json)
        config = inference_config(tiny_model, tmp_path / "replica", adapter_store=store.address)
        with pytest.raises(FailedPrecondition, match=r"mlp\.gate_proj") as caught, run_inference(config):
            pass
        assert caught.value.reason == "BASE_MODEL_MISMATCH"


class Store:
    """A lookup whose answers the test decides."""

    def __init__(self) -> None:
        self.version = 1
        self.away = False
        self.asked = 0
        self.meanwhile: Callable[[], None] = lambda: None

    async def lookup(self, reference: str, _known: bool) -> Meaning:
        self.asked += 1
        if self.away:
            raise Unavailable("STORE_UNAVAILABLE", "away")
        meaning = Meaning(reference, {Target(self.version): AdapterVersion(NAME, self.version, "d", "p", 1)})
        self.meanwhile()
        return meaning


class Snapshot:
    """A resolver over `Store`, with a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.store = Store()
        self.resolver = Resolver(TINY_BASE, self.store.lookup, lambda: self.now)

    def resolve(self) -> int:
        version = asyncio.run(self.resolver.resolve(NAME))
        assert version is not None
        return version.version


def test_without_a_watch_answers_age() -> None:
    snapshot = Snapshot()
    assert [snapshot.resolve(), snapshot.resolve()] == [1, 1]
    assert snapshot.store.asked == 1
    snapshot.now, snapshot.store.version = FRESH_SECONDS, 2
    assert snapshot.resolve() == 2


def test_while_the_watch_lives_answers_stay() -> None:
    snapshot = Snapshot()
    snapshot.resolve()
    for _ in range(100):
        snapshot.now += FRESH_SECONDS / 2
        snapshot.resolver.seen()
        assert snapshot.resolve() == 1
    assert snapshot.store.asked == 1
    snapshot.store.version = 2
    assert snapshot.resolver.changed("acme/help") == []
    assert snapshot.resolver.changed(NAME) == [f"{NAME}:stable"]
    snapshot.resolver.seen()
    assert snapshot.resolve() == 2
    assert snapshot.store.asked == 2


def test_an_answer_that_a_change_overtook_is_asked_for_again() -> None:
    snapshot = Snapshot()
    snapshot.resolver.seen()
    snapshot.store.meanwhile = lambda: snapshot.resolver.changed(NAME)  # type: ignore[assignment,return-value]
    assert snapshot.resolve() == 1
    snapshot.store.meanwhile, snapshot.store.version = lambda: None, 2
    assert snapshot.resolve() == 2


def test_while_the_store_is_away_the_last_answer_serves() -> None:
    snapshot = Snapshot()
    snapshot.resolve()
    snapshot.store.away = True
    snapshot.resolver.reset()
    assert snapshot.resolve() == 1
    with pytest.raises(Unavailable):
        asyncio.run(snapshot.resolver.resolve("acme/other"))


def test_profile_comparison_names_what_differs(tiny_model: Path) -> None:
    profile = profile_from_config(TINY_BASE, (tiny_model / "config.json").read_text(), max_lora_rank=32)
    check_profile(profile, profile.modules, profile.vocab_size, 32)
    first = next(iter(profile.modules))
    cases = [
        (profile.modules, profile.vocab_size + 1, 32, "vocabulary"),
        (dict(list(profile.modules.items())[1:]), profile.vocab_size, 32, "linears"),
        (profile.modules | {first: Shape(1, 2)}, profile.vocab_size, 32, first),
        (profile.modules, profile.vocab_size, 31, "--max-lora-rank is 31"),
    ]
    for modules, vocab_size, rank, says in cases:
        with pytest.raises(FailedPrecondition, match=says):
            check_profile(profile, modules, vocab_size, rank)
