"""The way of an adapter on a replica: pulled once however many wait, claimed, given a slot, and let go in order."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import DataLoss, FailedPrecondition, Internal, Unavailable
from services.inference.adapters.disk_cache import DiskCache
from services.inference.adapters.manager import AdapterManager
from services.inference.engine.request import AdapterVersion
from tests.inference.adapters.packs import Pack, base_shapes, lying, make_pool


@dataclass
class HandingOut:
    """A puller that hands out the bytes a test gave it, when the test lets it.

    gate: pulls wait here; errors: raised half way, one a pull
    """

    data: dict[str, bytes]
    gate: threading.Event = field(default_factory=threading.Event)
    errors: list[Exception] = field(default_factory=list)
    pulls: Counter[str] = field(default_factory=Counter)

    def pull(self, adapter: AdapterVersion, offset: int = 0) -> Iterator[bytes]:
        assert offset == 0
        self.pulls[adapter.name.removeprefix("default/")] += 1
        data = self.data[adapter.pack_digest]
        yield data[:100]
        assert self.gate.wait(timeout=60)
        if self.errors:
            raise self.errors.pop(0)
        yield data[100:]

    def close(self) -> None:
        self.gate.set()


@dataclass
class Bench:
    manager: AdapterManager
    puller: HandingOut
    packs: dict[str, Pack]
    ended: queue.SimpleQueue[None]
    directory: Path

    def version(self, name: str) -> AdapterVersion:
        return self.packs[name].version

    def claim(self, name: str) -> bool:
        return self.manager.try_claim(self.version(name))

    def settle(self, fetches: int = 1) -> None:
        """Wait until so many fetches have ended, and take them in as a step does."""
        for _ in range(fetches):
            self.ended.get(timeout=60)
        self.manager.poll()
        self.manager.check_integrity()

    def bring(self, *names: str) -> None:
        """Claim adapters and wait until they are in memory."""
        for name in names:
            assert self.claim(name)
            if not self.manager.is_ready(self.version(name)):
                self.settle()
            assert self.manager.is_ready(self.version(name))

    def let_go(self, *names: str) -> None:
        for name in names:
            self.manager.unclaim(self.version(name))
        self.manager.check_integrity()

    def run(self, *names: str) -> list[int | None]:
        """Give ready adapters their slots."""
        slots = [self.manager.acquire(self.version(name)) for name in names]
        self.manager.check_integrity()
        return slots

    def tiers(self, *names: str) -> list[str]:
        return [self.manager.tier(self.version(name)) for name in names]


def make_bench(
    packs: dict[str, Pack],
    directory: Path,
    *,
    max_loras: int = 2,
    max_cpu_loras: int = 3,
    max_lora_rank: int = 40,
    store: bool = True,
) -> Bench:
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()
    puller = HandingOut({pack.version.pack_digest: pack.data for pack in packs.values()})
    puller.gate.set()
    manager = AdapterManager(
        puller if store else None,
        DiskCache(directory, 1 << 30),
        make_pool(max_loras=max_loras),
        base_shapes(max_lora_rank=max_lora_rank),
        max_cpu_loras,
        notify=lambda: ended.put(None),
    )
    return Bench(manager, puller, packs, ended, directory)


@pytest.fixture
def bench(packs: dict[str, Pack], tmp_path: Path) -> Iterator[Bench]:
    made = make_bench(packs, tmp_path)
    yield made
    made.manager.close()


def test_the_way_from_the_store_to_a_slot_and_back(bench: Bench) -> None:
    assert bench.tiers("half") == ["STORE"]
    bench.bring("half")
    assert bench.tiers("half") == ["CPU"]
    assert bench.run("half") == [0]
    assert bench.tiers("half") == ["GPU"]
    bench.manager.release(bench.version("half"))
    bench.let_go("half")
    assert bench.tiers("half") == ["GPU"], "idle, and kept"
    bench.bring("rank-1", "rank-16", "rank-17")
    assert bench.tiers("half") == ["DISK"], "out of host memory, and so out of the pool"
    bench.let_go("rank-1")
    bench.bring("half")
    assert bench.puller.pulls["half"] == 1, "read from disk, not pulled again"


def test_many_claims_are_one_pull(bench: Bench) -> None:
    bench.puller.gate.clear()
    assert all(bench.claim("half") for _ in range(20))
    bench.manager.poll()
    assert not bench.manager.is_ready(bench.version("half"))
    bench.puller.gate.set()
    bench.settle()
    assert bench.manager.is_ready(bench.version("half"))
    assert bench.puller.pulls["half"] == 1
    assert bench.ended.empty()


def test_a_claim_given_up_while_it_is_pulled_keeps_its_room(bench: Bench) -> None:
    bench.puller.gate.clear()
    assert all(bench.claim(name) for name in ("half", "rank-1", "rank-16"))
    bench.let_go("half")
    assert not bench.claim("rank-17"), "the pull under way has its room"
    bench.puller.gate.set()
    bench.settle(3)
    assert bench.tiers("half") == ["CPU"]
    assert bench.claim("rank-17"), "now it can go"
    assert bench.tiers("half") == ["DISK"]
    bench.settle()


def test_a_failure_is_told_to_all_who_wait_and_the_next_one_tries_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.puller.errors = [Unavailable("STORE_AWAY", "gone")]
    version = bench.version("half")
    assert bench.claim("half") and bench.claim("half")
    with caplog.at_level(logging.CRITICAL):
        bench.settle()
    for _ in range(2):
        assert isinstance(bench.manager.failure(version), Unavailable)
        assert not bench.manager.is_ready(version)
        bench.let_go("half")
    assert bench.manager.failure(version) is None
    assert [resident.error for resident in bench.manager.list({})] == ["gone [STORE_AWAY]"]
    bench.bring("half")
    assert bench.puller.pulls["half"] == 2
    assert [resident.error for resident in bench.manager.list({})] == [""]


def test_a_claim_while_a_failure_is_being_told_starts_anew(bench: Bench) -> None:
    bench.puller.errors = [Unavailable("STORE_AWAY", "gone")]
    assert bench.claim("half")
    bench.settle()
    bench.puller.gate.clear()
    assert bench.claim("half")
    assert bench.manager.failure(bench.version("half")) is None, "the old failure is not the new fetch's"
    bench.puller.gate.set()
    bench.settle()
    assert bench.manager.is_ready(bench.version("half"))
    assert bench.manager.failure(bench.version("half")) is None


def test_a_fault_that_is_not_ours_to_name_fails_only_its_fetch(bench: Bench) -> None:
    bench.puller.errors = [ZeroDivisionError("surprise")]
    assert bench.claim("half")
    bench.settle()
    assert isinstance(bench.manager.failure(bench.version("half")), ZeroDivisionError)
    bench.let_go("half")
    bench.bring("half")


def test_wrong_bytes_fail_that_claim_and_nothing_stays(bench: Bench) -> None:
    version = bench.version("half")
    right = bench.puller.data[version.pack_digest]
    bench.puller.data[version.pack_digest] = right[:-1] + b"?"
    assert bench.claim("half")
    bench.settle()
    assert isinstance(bench.manager.failure(version), DataLoss)
    assert list(bench.directory.iterdir()) == []
    bench.let_go("half")
    bench.puller.data[version.pack_digest] = right
    bench.bring("half")


def test_a_file_damaged_on_disk_is_pulled_again(bench: Bench) -> None:
    bench.bring("half", "rank-1", "rank-16")
    bench.let_go("half", "rank-1", "rank-16")
    bench.bring("rank-17")
    (bench.directory / bench.version("half").pack_digest.removeprefix("sha256:")).write_bytes(b"damage")
    assert bench.tiers("half") == ["DISK"]
    bench.bring("half")
    assert bench.puller.pulls["half"] == 2


def test_an_adapter_that_does_not_fit_this_replica(packs: dict[str, Pack], tmp_path: Path) -> None:
    bench = make_bench(packs, tmp_path, max_lora_rank=16)
    assert bench.claim("rank-17")
    bench.settle()
    failure = bench.manager.failure(bench.version("rank-17"))
    assert isinstance(failure, FailedPrecondition)
    assert failure.reason == "ADAPTER_RANK_TOO_HIGH"
    bench.manager.close()


def test_without_a_store_only_the_disk_helps(packs: dict[str, Pack], tmp_path: Path) -> None:
    filled = make_bench(packs, tmp_path)
    filled.bring("half")
    filled.manager.close()
    bench = make_bench(packs, tmp_path, store=False)
    assert bench.tiers("half", "rank-1") == ["DISK", "STORE"]
    bench.bring("half")
    assert bench.claim("rank-1")
    bench.settle()
    assert isinstance(bench.manager.failure(bench.version("rank-1")), Internal)
    bench.manager.close()


def test_claims_never_exceed_host_memory(bench: Bench) -> None:
    bench.bring("half", "rank-1", "rank-16")
    assert not bench.claim("rank-17")
    assert bench.claim("half"), "one that is there can always be claimed again"
    bench.let_go("rank-1")
    bench.bring("rank-17")
    assert bench.tiers("half", "rank-1", "rank-16", "rank-17") == ["CPU", "DISK", "CPU", "CPU"]


def test_only_idle_slots_are_taken_the_least_recently_used_first(bench: Bench) -> None:
    bench.bring("half", "rank-1", "rank-16")
    assert bench.run("half", "rank-1") == [0, 1]
    assert bench.run("rank-16") == [None], "both slots are held"
    bench.manager.release(bench.version("half"))
    bench.manager.release(bench.version("rank-1"))
    assert bench.run("half") == [0]
    bench.manager.release(bench.version("half"))
    assert bench.run("rank-16") == [1], "rank-1 was used before half"
    assert bench.tiers("half", "rank-1", "rank-16") == ["GPU", "CPU", "GPU"]
    assert (bench.manager.loads, bench.manager.evictions) == (3, 1)


def test_a_held_slot_is_passed_over(bench: Bench) -> None:
    bench.bring("half", "rank-1", "rank-16")
    bench.run("half", "rank-1")
    bench.manager.release(bench.version("rank-1"))
    assert bench.run("rank-16") == [1]
    assert bench.tiers("half") == ["GPU"]


def test_one_slot_for_many_requests_is_held_until_the_last_lets_go(bench: Bench) -> None:
    bench.bring("half", "rank-1", "rank-16")
    assert bench.run("half", "half", "rank-1") == [0, 0, 1]
    bench.manager.release(bench.version("half"))
    assert bench.run("rank-16") == [None]
    bench.manager.release(bench.version("half"))
    assert bench.run("rank-16") == [0]


def test_the_list_tells_the_truth(bench: Bench) -> None:
    bench.bring("half", "rank-17")
    bench.run("rank-17")
    newest, oldest = bench.manager.list({bench.version("half").digest: 4})
    assert (newest.adapter.name, newest.tier, newest.slot, newest.references) == ("default/rank-17", "GPU", 0, 1)
    assert (newest.pages, newest.rank, newest.waiting) == (6, 17, 0)
    assert (oldest.adapter.name, oldest.tier, oldest.slot, oldest.pages) == ("default/half", "CPU", None, 0)
    assert (oldest.waiting, oldest.requests, oldest.cpu_bytes) == (4, 1, len(bench.packs["half"].data))


@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["claim", "claim", "settle", "acquire", "acquire", "release", "unclaim"]), st.integers(0, 7)
        ),
        max_size=60,
    )
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_order_of_claims_and_slots(
    packs: dict[str, Pack], tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int]]
) -> None:
    bench = make_bench(packs, tmp_path_factory.mktemp("disk"), max_loras=2, max_cpu_loras=4)
    manager, names = bench.manager, list(packs)
    claims, held, fetching = Counter[str](), Counter[str](), set[str]()

    def settle() -> None:
        bench.settle(len(fetching))
        assert all(manager.is_ready(bench.version(name)) for name in fetching)
        fetching.clear()

    for operation, index in operations:
        name = names[index]
        version = bench.version(name)
        if operation == "claim":
            ready = manager.is_ready(version)
            if manager.try_claim(version):
                claims[name] += 1
                if not ready:
                    fetching.add(name)
        elif operation == "settle":
            settle()
        elif operation == "acquire" and claims[name] > held[name] and manager.is_ready(version):
            slot = manager.acquire(version)
            others = {other for other, count in held.items() if count and other != name}
            assert (slot is None) == (len(others) == 2 and not held[name])
            held[name] += slot is not None
        elif operation == "release" and held[name]:
            manager.release(version)
            held[name] -= 1
        elif operation == "unclaim" and claims[name] > held[name]:
            manager.unclaim(version)
            claims[name] -= 1
        manager.poll()
        manager.check_integrity()
        assert all(manager.tier(bench.version(other)) == "GPU" for other, count in held.items() if count)
        assert len({other for other, count in claims.items() if count}) <= 4
    settle()
    for name in names:
        while held[name]:
            manager.release(bench.version(name))
            held[name] -= 1
        while claims[name]:
            manager.unclaim(bench.version(name))
            claims[name] -= 1
    manager.check_integrity()
    for digest, layer, linear, _, a, _, rank, _ in lying(manager._pool):
        pack = next(pack for pack in packs.values() if pack.version.digest == digest)
        if (module := pack.adapter().module(layer, linear)) is not None:
            assert torch.equal(a[:rank], module.a.float())
    manager.close()
