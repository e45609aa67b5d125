"""The manager under any order of what requests, operators, the store, the disk and time do to it.

After each turn the states and the owners' books agree. At the end, when the faults are over and time has passed, every
adapter can be had, and what lies in the pool is what was registered.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from services.common.errors import MultiloraError, ResourceExhausted, Unavailable
from services.inference.adapters import failures
from tests.inference.adapters.packs import Pack, lying
from tests.inference.adapters.test_manager import make_bench

NAMES = st.sampled_from(["rank-1", "rank-17", "rank-40", "one-layer", "half", "brain"])


class Workers:
    """Fetch workers that work when they are told to."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self.jobs.append(lambda: function(*arguments))

    def shutdown(self, **_: Any) -> None:
        self.jobs.clear()


def machine(packs: dict[str, Pack]) -> type[RuleBasedStateMachine]:
    class ManagerMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.directory = tempfile.TemporaryDirectory()
            sizes = [pack.version.pack_size for pack in packs.values()]
            self.bench = make_bench(
                packs,
                Path(self.directory.name),
                max_loras=2,
                max_resident=3,
                max_cpu_loras=4,
                max_cpu_bytes=2 * max(sizes),
                max_disk_bytes=2 * max(sizes),
                idle_ttl=5.0,
            )
            self.manager = self.bench.manager
            self.workers = self.manager._fetcher._workers = Workers()  # type: ignore[assignment]
            self.claims: Counter[str] = Counter()
            self.draining: set[str] = set()

        @rule(name=NAMES)
        def claim(self, name: str) -> None:
            version = self.bench.version(name)
            failed = self.manager.failure(version)
            jobs = len(self.workers.jobs)
            if self.bench.claim(name):
                self.claims[name] += 1
            assert failed is None or len(self.workers.jobs) == jobs, "a failed adapter is not left alone"

        @rule(name=NAMES)
        def prefetch(self, name: str) -> None:
            self.manager.prefetch(self.bench.version(name))

        @rule(name=NAMES)
        def unclaim(self, name: str) -> None:
            if self.claims[name]:
                self.manager.unclaim(self.bench.version(name))
                self.claims[name] -= 1

        @rule(name=NAMES)
        def bring(self, name: str) -> None:
            """Claim it and let every fetch end well."""
            self.claim(name)
            while self.workers.jobs:
                self.workers.jobs.pop()()
            self.manager.poll()

        @rule(order=st.randoms(use_true_random=False), fails=st.sampled_from([False, False, True]))
        def step(self, order: random.Random, fails: bool) -> None:
            """Everyone who can runs, the resident adapters first, as the scheduler has it; all let go afterwards."""
            ready = [name for name in packs if self.claims[name] and self.manager.is_ready(self.bench.version(name))]
            order.shuffle(ready)
            ready.sort(key=lambda name: self.bench.tiers(name) != ["GPU"])
            resident = [name for name in ready if self.bench.tiers(name) == ["GPU"]]
            with pytest.MonkeyPatch.context() as patch:
                if fails:
                    patch.setattr(self.bench.pool, "_copy", lambda *_: 1 / 0)
                slots = {name: self.manager.acquire(self.bench.version(name)) for name in ready}
            got = [slot for slot in slots.values() if isinstance(slot, int)]
            assert len(set(got)) == len(got), "one slot for two adapters"
            assert all(slots[name] in got for name in resident), "a resident adapter lost its slot in its own step"
            assert fails or not ready or got, "nobody runs"
            self.manager.check_integrity()
            for name, slot in slots.items():
                if isinstance(slot, int):
                    self.manager.release(self.bench.version(name))

        @rule(data=st.data(), fault=st.sampled_from([None, Unavailable("AWAY", "gone"), OSError("the network")]))
        def a_fetch_ends(self, data: st.DataObject, fault: Exception | None) -> None:
            if self.workers.jobs:
                job = self.workers.jobs.pop(data.draw(st.integers(0, len(self.workers.jobs) - 1)))
                self.bench.puller.errors = [] if fault is None else [fault]
                job()
                self.bench.puller.errors = []

        @rule(name=NAMES)
        def the_disk_cannot_be_read(self, name: str) -> None:
            def unreadable(_: str) -> None:
                raise OSError("the disk")

            self.claim(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.manager._disk, "read", unreadable)
                while self.workers.jobs:
                    self.workers.jobs.pop()()
            self.manager.poll()

        @rule(name=NAMES)
        def the_disk_is_damaged(self, name: str) -> None:
            path = self.bench.directory / self.bench.version(name).pack_digest.removeprefix("sha256:")
            if path.exists():
                path.write_bytes(b"damage")

        @rule(seconds=st.sampled_from([0.05, 0.5, 6.0, 40.0]))
        def time_passes(self, seconds: float) -> None:
            self.bench.clock.now += seconds

        @rule()
        def poll(self) -> None:
            self.manager.poll()
            due = self.manager.next_deadline()
            assert due is None or due > 0, "what was due is not done"

        @rule(name=NAMES)
        def pin(self, name: str) -> None:
            try:
                self.manager.pin(self.bench.version(name))
            except ResourceExhausted:
                assert sum(each.pinned for each in self.manager.list({})) == 3

        @rule(name=NAMES)
        def unpin(self, name: str) -> None:
            self.manager.unpin(self.bench.version(name))

        @rule(name=NAMES, here=st.booleans(), data=st.data())
        def drain(self, name: str, here: bool, data: st.DataObject) -> None:
            resident = [other for other in packs if self.manager.is_ready(self.bench.version(other))]
            if here and resident:
                name = data.draw(st.sampled_from(resident))
            self.manager.drain(f"default/{name}", None)
            self.draining.add(name)

        @rule(evict=st.booleans())
        def drains_end(self, evict: bool) -> None:
            for name in self.draining:
                self.manager.end_drain(f"default/{name}", None, evict=evict)
            self.draining.clear()

        @rule(name=NAMES)
        def delete(self, name: str) -> None:
            self.manager.drop(f"default/{name}", 1)

        @invariant()
        def books_agree(self) -> None:
            self.manager.check_integrity()
            for name, count in self.claims.items():
                version = self.bench.version(name)
                failure = self.manager.failure(version)
                assert failure is None or (isinstance(failure, MultiloraError) and failure.retry_after is not None)
                state = self.bench.state(name) if count else ""
                assert state != "STORE", "claimed, and nothing brings it"

        def teardown(self) -> None:
            for name in [*self.claims.elements()]:
                self.unclaim(name)
            for name in packs:
                self.unpin(name)
                self.manager.end_drain(f"default/{name}", None, evict=True)
            for name in NAMES.elements:  # type: ignore[attr-defined]
                assert self.bench.claim(name) or self.settle() or self.bench.claim(name)
                self.settle()
                assert self.manager.is_ready(self.bench.version(name)), "it cannot be had any more"
                assert isinstance(self.bench.step(name)[0], int)
                self.bench.let_go(name)
            for digest, layer, linear, _, a, _, rank, _ in lying(self.bench.pool):
                pack = next(pack for pack in packs.values() if pack.version.digest == digest)
                if (module := pack.adapter().module(layer, linear)) is not None:
                    assert torch.equal(a[:rank], module.a.float())
            self.manager.close()
            self.directory.cleanup()

        def settle(self) -> None:
            """Until nothing is under way, however long it takes."""
            for _ in range(4):
                while self.workers.jobs:
                    self.workers.jobs.pop()()
                self.bench.clock.now += failures.LAST_REST
                self.manager.poll()

    return ManagerMachine


def test_any_order_of_everything(packs: dict[str, Pack]) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine(packs),
        settings=settings(
            max_examples=25,
            stateful_step_count=100,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
