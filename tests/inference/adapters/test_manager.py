"""The way of an adapter on a replica: pulled once however many wait, claimed, given a slot, and let go in order."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    MultiloraError,
    ResourceExhausted,
    Unavailable,
)
from services.inference.adapters import copies, failures
from services.inference.adapters.copies import Lanes
from services.inference.adapters.disk_cache import DiskCache
from services.inference.adapters.manager import AdapterManager
from services.inference.adapters.slot_pool import SlotPool
from services.inference.engine.interfaces import Lack
from services.inference.engine.request import AdapterVersion
from tests.inference.adapters.lanes import HeldLanes
from tests.inference.adapters.packs import Pack, base_shapes, lying, make_pool

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


@dataclass
class HandingOut:
    """A puller that hands out the bytes a test gave it, when the test lets it.

    gate: pulls wait here; errors: raised half way, one a pull; offsets: where pulls began, in their order
    """

    data: dict[str, bytes]
    gate: threading.Event = field(default_factory=threading.Event)
    errors: list[Exception] = field(default_factory=list)
    pulls: Counter[str] = field(default_factory=Counter)
    offsets: list[int] = field(default_factory=list)

    def pull(self, adapter: AdapterVersion, offset: int = 0) -> Iterator[bytes]:
        self.pulls[adapter.name.removeprefix("default/")] += 1
        self.offsets.append(offset)
        data = self.data[adapter.pack_digest]
        if offset < 100:
            yield data[offset:100]
        assert self.gate.wait(timeout=60)
        if self.errors:
            raise self.errors.pop(0)
        yield data[max(offset, 100) :]

    def close(self) -> None:
        self.gate.set()


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    manager: AdapterManager
    puller: HandingOut
    packs: dict[str, Pack]
    ended: queue.SimpleQueue[None]
    directory: Path
    clock: Clock
    pool: SlotPool

    def version(self, name: str) -> AdapterVersion:
        return self.packs[name].version

    def claim(self, name: str) -> bool:
        return self.manager.try_claim(self.version(name))

    def settle(self, fetches: int = 1) -> None:
        """Wait until so many fetches have ended, and take them in as a step does."""
        for _ in range(fetches):
            self.ended.get(timeout=20)
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

    def run(self, *names: str) -> list[int | Lack]:
        """Give ready adapters their slots."""
        slots = [self.manager.acquire(self.version(name)) for name in names]
        self.manager.check_integrity()
        return slots

    def step(self, *names: str) -> list[int | Lack]:
        """Give ready adapters their slots for one step."""
        slots = self.run(*names)
        for name, slot in zip(names, slots, strict=True):
            if isinstance(slot, int):
                self.manager.release(self.version(name))
        return slots

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.manager.poll()
        self.manager.check_integrity()

    def state(self, name: str) -> str:
        return next(each.state for each in self.manager.list({}) if each.adapter == self.version(name))

    def fail(self, name: str, *errors: Exception) -> MultiloraError:
        """Claim an adapter whose pulls break until it has failed, and let go of it; what it failed with."""
        self.puller.errors = list(errors)
        assert self.claim(name)
        self.settle()
        while self.manager.failure(self.version(name)) is None:
            self.wait(failures.LAST_DELAY)
            self.settle()
        failure = self.manager.failure(self.version(name))
        self.let_go(name)
        assert isinstance(failure, MultiloraError)
        return failure

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
    max_resident: int = 0,
    max_cpu_bytes: int = 0,
    idle_ttl: float = 0.0,
    max_disk_bytes: int = 1 << 30,
    lanes: Lanes | None = None,
) -> Bench:
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()
    puller = HandingOut({pack.version.pack_digest: pack.data for pack in packs.values()})
    puller.gate.set()
    clock, pool = Clock(), make_pool(max_loras=max_loras, max_resident=max_resident, lanes=lanes)
    manager = AdapterManager(
        puller if store else None,
        DiskCache(directory, max_disk_bytes),
        pool,
        base_shapes(max_lora_rank=max_lora_rank),
        max_cpu_loras,
        notify=lambda: ended.put(None),
        max_cpu_bytes=max_cpu_bytes,
        idle_ttl=idle_ttl,
        clock=clock,
        chance=lambda: 1.0,
    )
    return Bench(manager, puller, packs, ended, directory, clock, pool)


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


def test_a_broken_pull_goes_on_where_it_broke(bench: Bench) -> None:
    bench.puller.errors = [Unavailable("STORE_AWAY", "gone")] * 2
    assert bench.claim("half")
    bench.settle()
    assert (bench.state("half"), bench.manager.failure(bench.version("half"))) == ("PULLING", None)
    assert bench.manager.next_deadline() == failures.FIRST_DELAY
    bench.wait(failures.FIRST_DELAY / 2)
    assert bench.ended.empty() and bench.puller.pulls["half"] == 1, "tried again before its time"
    bench.wait(failures.FIRST_DELAY)
    bench.settle()
    bench.wait(failures.FIRST_DELAY * 2)
    bench.settle()
    assert bench.manager.is_ready(bench.version("half"))
    assert bench.puller.offsets == [0, 100, 100]


def test_a_pull_cut_short_goes_on(bench: Bench) -> None:
    version = bench.version("half")
    whole = bench.puller.data[version.pack_digest]
    bench.puller.data[version.pack_digest] = whole[:150]
    assert bench.claim("half")
    bench.settle()
    bench.puller.data[version.pack_digest] = whole
    bench.wait(failures.FIRST_DELAY)
    bench.settle()
    assert bench.manager.is_ready(version)
    assert bench.puller.offsets == [0, 150]


def test_a_store_that_stays_away_fails_the_adapter_for_a_while(bench: Bench) -> None:
    away = [Unavailable("STORE_AWAY", "gone")] * failures.PULL_ATTEMPTS
    failure = bench.fail("half", *away)
    assert isinstance(failure, Unavailable)
    assert (failure.retry_after, failure.field) == (failures.FIRST_REST, "adapter")
    assert bench.puller.pulls["half"] == failures.PULL_ATTEMPTS
    assert list(bench.directory.iterdir()) == []
    assert bench.claim("half"), "claimed, and told at once"
    bench.wait(failures.FIRST_REST / 4)
    again = bench.manager.failure(bench.version("half"))
    assert again is not None and again.retry_after == failures.FIRST_REST * 3 / 4
    bench.let_go("half")
    assert bench.puller.pulls["half"] == failures.PULL_ATTEMPTS, "a failed adapter is left alone"
    assert [resident.error for resident in bench.manager.list({})] == ["gone [STORE_AWAY]"]
    bench.wait(failures.FIRST_REST)
    assert bench.manager.failure(bench.version("half")) is None
    second = bench.fail("half", *away)
    assert second.retry_after == 2 * failures.FIRST_REST, "the rest grows"
    bench.wait(2 * failures.FIRST_REST)
    bench.bring("half")
    assert [resident.error for resident in bench.manager.list({})] == [""]
    bench.let_go("half")


def test_a_claim_held_over_a_rest_is_fetched_for(bench: Bench) -> None:
    bench.fail("half", ZeroDivisionError("surprise"))
    assert bench.claim("half")
    bench.wait(failures.FIRST_LONG_REST)
    bench.settle()
    assert bench.manager.is_ready(bench.version("half"))


def test_a_fault_that_is_not_ours_to_name_fails_only_its_adapter(bench: Bench) -> None:
    failure = bench.fail("half", ZeroDivisionError("surprise"))
    assert (type(failure), failure.reason, failure.retry_after) == (
        Internal,
        "ADAPTER_FAILED",
        failures.FIRST_LONG_REST,
    )
    bench.bring("rank-1")
    bench.wait(failures.FIRST_LONG_REST)
    bench.bring("half")


@pytest.mark.parametrize("spoil", [lambda data: data[:-1] + b"?", lambda data: data + b"?"], ids=["other", "more"])
def test_wrong_bytes_fail_at_once_and_nothing_stays(bench: Bench, spoil: Callable[[bytes], bytes]) -> None:
    version = bench.version("half")
    right = bench.puller.data[version.pack_digest]
    bench.puller.data[version.pack_digest] = spoil(right)
    failure = bench.fail("half")
    assert isinstance(failure, DataLoss)
    assert (failure.retry_after, bench.puller.pulls["half"]) == (failures.FIRST_LONG_REST, 1)
    assert list(bench.directory.iterdir()) == []
    bench.puller.data[version.pack_digest] = right
    bench.wait(failures.FIRST_LONG_REST)
    bench.bring("half")


def test_a_copy_to_the_pool_that_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.bring("half", "rank-1")
    bench.step("rank-1")

    def fault(*_: object) -> None:
        raise MemoryError("no room for the copy")

    with monkeypatch.context() as patched:
        patched.setattr(bench.pool, "_copy", fault)
        assert bench.run("half", "half") == [Lack.ADAPTER, Lack.ADAPTER]
    failure = bench.manager.failure(bench.version("half"))
    assert failure is not None and failure.reason == "ADAPTER_FAILED"
    bench.ended.get(timeout=20)  # the engine is woken, to tell its requests
    assert not bench.manager.is_ready(bench.version("half"))
    assert bench.tiers("rank-1") == ["GPU"], "the others stay"
    bench.let_go("half")
    bench.wait(failures.FIRST_LONG_REST)
    bench.bring("half")
    assert bench.step("half") == [1]


@pytest.fixture
def lanes() -> HeldLanes:
    return HeldLanes()


@pytest.fixture
def late(packs: dict[str, Pack], tmp_path: Path, lanes: HeldLanes) -> Iterator[Bench]:
    """A bench whose copies are done when `lanes` do them, a layer at a time under way."""
    made = make_bench(packs, tmp_path, lanes=lanes)
    yield made
    made.manager.close()


def test_others_run_while_copies_are_under_way(late: Bench, lanes: HeldLanes) -> None:
    late.bring("half", "rank-1")
    assert late.step("half") == [Lack.ADAPTER]
    lanes.work()
    assert late.step("half") == [Lack.ADAPTER], "steps take in what arrived before they began"
    late.wait(0)
    assert late.step("half", "rank-1", "half") == [0, Lack.ADAPTER, 0]
    lanes.work()
    late.wait(0)
    assert late.step("rank-1", "half") == [1, 0]
    assert late.manager.loads == 2


def test_a_prompt_may_follow_its_adapters_copy(late: Bench, lanes: HeldLanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once every layer's copy has begun; and whoever comes after it finds the copy done, in the device's order."""
    monkeypatch.setattr(copies, "AHEAD_BYTES", 1)
    late.bring("half")
    version = late.version("half")
    assert late.manager.acquire(version, follows=True) is Lack.ADAPTER, "a layer is yet to begin"
    lanes.work()
    late.wait(0)
    assert late.manager.acquire(version) is Lack.ADAPTER
    assert late.manager.acquire(version, follows=True) == 0
    late.manager.release(version)
    late.manager.check_integrity()
    assert late.step("half") == [0]
    assert not late.pool.slots()[0].arrived, "nobody waited"


def test_a_copy_under_way_keeps_its_slot(late: Bench, lanes: HeldLanes) -> None:
    """Whoever asks first runs first: the others do not take the slot from under its copy."""
    late.bring("half", "rank-1", "rank-16")
    for _ in range(2):
        assert late.step("half", "rank-1", "rank-16") == [Lack.ADAPTER, Lack.ADAPTER, Lack.ROOM]
    assert not lanes.done
    lanes.work()
    late.wait(0)
    assert late.step("half", "rank-1") == [0, 1]


def test_an_adapter_that_leaves_while_its_copy_is_under_way(late: Bench, lanes: HeldLanes) -> None:
    late.bring("half")
    assert late.step("half") == [Lack.ADAPTER]
    late.let_go("half")
    late.manager.drop("default/half", 1)
    late.bring("rank-1")
    assert late.step("rank-1") == [Lack.ADAPTER]
    lanes.work()
    late.wait(0)
    assert late.step("rank-1")[0] in (0, 1)


def test_a_device_without_memory_for_the_copy(late: Bench, lanes: HeldLanes) -> None:
    """Those who asked for the adapter are told to try later; the pool is whole, and others use it."""
    late.bring("half", "rank-1")
    lanes.faults["copy"] = NO_MEMORY
    assert late.run("half") == [Lack.ADAPTER]
    late.pool.check_integrity()
    failure = late.manager.failure(late.version("half"))
    assert isinstance(failure, ResourceExhausted) and failure.reason == "DEVICE_MEMORY_FULL"
    assert failure.retry_after == pytest.approx(failures.FIRST_REST)
    assert late.step("rank-1") == [Lack.ADAPTER]
    lanes.work()
    late.wait(0)
    assert late.step("rank-1")[0] in (0, 1)


@pytest.mark.parametrize(
    ("lane", "fault", "kind", "reason"),
    [
        ("copy", NO_MEMORY, ResourceExhausted, "DEVICE_MEMORY_FULL"),
        ("scatter", RuntimeError("CUDA error: invalid argument"), Internal, "ADAPTER_FAILED"),
    ],
)
def test_a_later_layer_that_fails(
    lane: str,
    fault: Exception,
    kind: type[MultiloraError],
    reason: str,
    late: Bench,
    lanes: HeldLanes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends that adapter's load, whose state had been GPU, and no other's."""
    monkeypatch.setattr(copies, "AHEAD_BYTES", 1)
    late.bring("half", "rank-1")
    assert late.step("half", "rank-1") == [Lack.ADAPTER] * 2
    lanes.work()
    lanes.faults[lane] = fault
    late.wait(0)
    assert late.state("half") == "FAILED" and late.tiers("half", "rank-1") == ["STORE", "GPU"]
    failure = late.manager.failure(late.version("half"))
    assert isinstance(failure, kind) and failure.reason == reason
    for _ in range(3):
        lanes.work()
        late.wait(0)
    assert late.step("rank-1") == [1]
    late.let_go("half")


def test_a_copy_that_fails_while_it_drains(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.bring("half")
    bench.manager.drain("default/half", 1)
    monkeypatch.setattr(bench.pool, "_copy", lambda *_: 1 / 0)
    assert bench.run("half") == [Lack.ADAPTER]
    assert bench.state("half") == "FAILED"
    bench.manager.end_drain("default/half", 1, evict=True)
    bench.let_go("half")


def test_pinned_adapters_stay_where_they_are(bench: Bench) -> None:
    bench.bring("half", "rank-1", "rank-16")
    bench.manager.pin(bench.version("half"))
    assert [bench.step(name) for name in ("half", "rank-1", "rank-16", "rank-1")] == [[0], [1], [1], [1]]
    bench.let_go("half", "rank-1", "rank-16")
    bench.bring("rank-17", "brain")
    assert bench.tiers("half") == ["GPU"], "longest unused, and kept"
    bench.manager.unpin(bench.version("half"))
    bench.let_go("rank-17", "brain")
    bench.bring("one-layer", "rank-40")
    bench.bring("rank-1")
    assert bench.tiers("half") == ["DISK"]


def test_pins_come_back_when_there_is_room_and_keep_nobody_out(bench: Bench) -> None:
    for name in ("half", "rank-1"):
        bench.manager.pin(bench.version(name))
    with pytest.raises(ResourceExhausted, match="--max-loras"):
        bench.manager.pin(bench.version("rank-16"))
    bench.manager.pin(bench.version("half"))
    bench.wait(0)
    bench.settle(2)
    bench.wait(0)
    assert bench.tiers("half", "rank-1") == ["GPU", "GPU"], "fetched and loaded before anyone asks"
    bench.bring("rank-16")
    assert bench.step("rank-16")[0] in (0, 1), "pins fill the pool, and yet another gets its turn"
    bench.wait(0)
    assert bench.tiers("rank-16") == ["GPU"], "it has requests: it is not driven out between two steps"
    bench.let_go("rank-16")
    bench.wait(0)
    assert bench.tiers("half", "rank-1", "rank-16") == ["GPU", "GPU", "CPU"]


def test_idle_adapters_leave_the_pool_after_their_time(packs: dict[str, Pack], tmp_path: Path) -> None:
    bench = make_bench(packs, tmp_path, max_loras=3, idle_ttl=10.0)
    bench.bring("half", "rank-1", "rank-16")
    bench.manager.pin(bench.version("rank-16"))
    bench.step("half", "rank-1", "rank-16")
    bench.let_go("half", "rank-16")
    assert bench.manager.next_deadline() == 10.0
    bench.wait(9.0)
    bench.bring("half")
    bench.step("half")
    bench.let_go("half")
    bench.wait(9.0)
    assert bench.tiers("half") == ["GPU"]
    bench.wait(1.0)
    assert bench.tiers("half", "rank-1", "rank-16") == ["CPU", "GPU", "GPU"], "asked for, or pinned: kept"
    assert bench.manager.next_deadline() is None
    bench.manager.close()


def test_an_unload_waits_for_those_who_have_it(bench: Bench) -> None:
    version = bench.version("half")
    bench.bring("half", "rank-1")
    bench.step("half")
    bench.manager.drain(version.name, None)
    assert bench.state("half") == "DRAINING"
    assert bench.step("half") == [0], "its requests go on"
    bench.let_go("half")
    bench.manager.end_drain(version.name, None, evict=True)
    bench.manager.check_integrity()
    assert (bench.state("half"), bench.tiers("half")) == ("DISK", ["DISK"])
    bench.bring("half")
    assert bench.state("half") == "CPU"


def test_an_unload_of_what_is_on_its_way_or_nowhere(bench: Bench) -> None:
    version = bench.version("half")
    bench.manager.drain("default/nobody", 1)
    bench.puller.gate.clear()
    assert bench.claim("half")
    bench.manager.drain(version.name, version.version)
    bench.puller.gate.set()
    bench.settle()
    assert bench.state("half") == "DRAINING"
    bench.manager.end_drain(version.name, version.version, evict=False)
    assert bench.state("half") == "CPU", "loaded again"
    bench.manager.drain(version.name, version.version)
    bench.manager.end_drain(version.name, version.version, evict=True)
    assert bench.state("half") == "CPU", "a request of another name has it"


def test_more_adapters_than_max_loras_as_far_as_pages_go(packs: dict[str, Pack], tmp_path: Path) -> None:
    bench = make_bench(packs, tmp_path, max_loras=1, max_resident=3, max_cpu_loras=4)
    bench.bring("half", "rank-1", "one-layer")
    assert bench.step("rank-1", "half", "one-layer") == [0, 1, 2], "three small ones in the pages of one large one"
    bench.bring("rank-40")
    assert bench.step("rank-40")[0] in (0, 1)
    assert bench.tiers("half") == ["CPU"], "the large one needs the pages"
    bench.manager.close()


def test_host_memory_is_bounded_in_bytes(packs: dict[str, Pack], tmp_path: Path) -> None:
    sizes = {name: pack.version.pack_size for name, pack in packs.items()}
    bench = make_bench(packs, tmp_path, max_cpu_loras=8, max_cpu_bytes=sizes["half"] + sizes["rank-1"])
    bench.bring("half", "rank-1")
    assert not bench.claim("one-layer")
    bench.let_go("half")
    bench.bring("one-layer")
    assert bench.tiers("half", "rank-1", "one-layer") == ["DISK", "CPU", "CPU"]
    failure = bench.manager.failure(bench.version("rank-40"))
    assert failure is not None and failure.reason == "ADAPTER_TOO_LARGE"
    bench.manager.close()


def test_what_the_disk_has_evicted_is_pulled_again(packs: dict[str, Pack], tmp_path: Path) -> None:
    bench = make_bench(packs, tmp_path, max_cpu_loras=2, max_disk_bytes=1)
    for name in ("half", "rank-1", "rank-16"):
        bench.bring(name)
        bench.let_go(name)
    assert bench.state("half") == "STORE"
    assert bench.manager.transitions["DISK", "STORE"] == 1
    bench.bring("half")
    assert bench.puller.pulls["half"] == 2
    bench.manager.close()


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
    failure = bench.manager.failure(bench.version("rank-1"))
    assert failure is not None and failure.reason == "NO_ADAPTER_STORE"
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
    assert bench.run("rank-16") == [Lack.ROOM], "both slots are held"
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
    assert bench.run("rank-16") == [Lack.ROOM]
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
        # one that was given up on may have come and gone again
        assert all(manager.is_ready(bench.version(name)) for name in fetching if claims[name])
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
            assert (slot is Lack.ROOM) == (len(others) == 2 and not held[name])
            held[name] += slot is not Lack.ROOM
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
