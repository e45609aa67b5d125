"""Moves adapters between the store, this node's disk, host memory and the slot pool: each place one owner's, and the
order of moves this file's, along the arrows of `states`.

The engine's thread calls everything here; only fetches run elsewhere, on a few workers, and meet the engine's thread
again in `poll`. What is in the pool is also in host memory, so a slot can always be given up.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence

from services.common.errors import FailedPrecondition, MultiloraError, ResourceExhausted
from services.inference.adapters import failures
from services.inference.adapters.cpu_cache import CpuCache
from services.inference.adapters.disk_cache import DiskCache
from services.inference.adapters.fetcher import Fetched, Fetcher, Puller
from services.inference.adapters.packed_adapter import BaseModelShapes, PackedAdapter
from services.inference.adapters.slot_pool import Slot, SlotPool
from services.inference.adapters.states import AdapterState, Transitions
from services.inference.adapters.tracked import Tracked, TrackedAdapters
from services.inference.engine.interfaces import Lack
from services.inference.engine.messages import ResidentAdapter
from services.inference.engine.request import AdapterVersion

log = logging.getLogger(__name__)

STORE, PULLING, DISK, CPU = AdapterState.STORE, AdapterState.PULLING, AdapterState.DISK, AdapterState.CPU
LOADING, GPU, FAILED, DRAINING = (
    AdapterState.LOADING,
    AdapterState.GPU,
    AdapterState.FAILED,
    AdapterState.DRAINING,
)


class AdapterManager:
    """The engine's view of adapters: claims on host memory, and slots. See `engine.interfaces.Adapters`.

    max_cpu_bytes: 0 bounds host memory by number alone; idle_ttl: 0 keeps idle adapters in the pool
    notify: called, from any thread, when there is something to poll
    clock: monotonic seconds; chance: 0 to 1, spreads attempts
    """

    def __init__(
        self,
        puller: Puller | None,
        disk: DiskCache,
        pool: SlotPool,
        base: BaseModelShapes,
        max_cpu_loras: int,
        notify: Callable[[], None],
        *,
        max_cpu_bytes: int = 0,
        idle_ttl: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._disk = disk
        self._pool = pool
        self._cpu = CpuCache(max_cpu_loras, self._on_cpu_evict, max_cpu_bytes)
        self._fetcher = Fetcher(puller, disk, base, notify)
        self._notify = notify
        self._idle_ttl = idle_ttl
        self._clock = clock
        self._chance = chance
        self._tracked = TrackedAdapters(lambda adapter: adapter.pack_digest in disk, self._is_at_rest)
        self._delayed: dict[str, Tracked] = {}
        self._failed: dict[str, Tracked] = {}
        self.evictions = 0
        self.loads = 0

    @property
    def transitions(self) -> Transitions:
        return self._tracked.transitions

    def tier(self, adapter: AdapterVersion) -> str:
        if self._pool.get(adapter.digest) is not None:
            return "GPU"
        if adapter.digest in self._cpu:
            return "CPU"
        return "DISK" if adapter.pack_digest in self._disk else "STORE"

    # ---- into host memory

    def prefetch(self, adapter: AdapterVersion) -> None:
        tracked = self._tracked.remember(adapter)
        if self._is_wanting(tracked) and self._cpu.try_claim(adapter.digest, adapter.pack_size):
            self._start_fetch(tracked)
            self._cpu.unclaim(adapter.digest)

    def try_claim(self, adapter: AdapterVersion) -> bool:
        if not self._cpu.try_claim(adapter.digest, adapter.pack_size):
            return False
        tracked = self._tracked.remember(adapter)
        tracked.requests += 1
        if self._is_wanting(tracked):
            self._start_fetch(tracked)
        return True

    def unclaim(self, adapter: AdapterVersion) -> None:
        self._tracked[adapter.digest].used_at = self._clock()
        self._cpu.unclaim(adapter.digest)

    def is_ready(self, adapter: AdapterVersion) -> bool:
        return adapter.digest in self._cpu

    def failure(self, adapter: AdapterVersion) -> MultiloraError | None:
        if not self._cpu.could_hold(adapter.pack_size):
            return FailedPrecondition(
                "ADAPTER_TOO_LARGE",
                f"adapter {adapter.name}@{adapter.version} has {adapter.pack_size} bytes, more than --max-cpu-bytes",
                field="adapter",
            )
        tracked = self._failed.get(adapter.digest)
        if tracked is None or tracked.error is None:
            return None
        return failures.cached(tracked.error, max(0.0, tracked.retry_at - self._clock()))

    # ---- into the pool

    def acquire(self, adapter: AdapterVersion, *, follows: bool = False) -> int | Lack:
        tracked = self._tracked[adapter.digest]
        if tracked.state is FAILED:
            return Lack.ADAPTER
        slot = self._pool.get(adapter.digest) or self._load(tracked, self._make_room)
        if slot is None:
            return Lack.ADAPTER if tracked.state is FAILED else Lack.ROOM
        slot.followed = slot.followed or (follows and self._pool.may_follow(slot))
        if not (slot.arrived or slot.followed):
            return Lack.ADAPTER
        slot.references += 1
        tracked.used_at = self._clock()
        self._pool.touch(adapter.digest)
        self._cpu.touch(adapter.digest)
        return slot.index

    def release(self, adapter: AdapterVersion) -> None:
        slot = self._pool.get(adapter.digest)
        assert slot is not None and slot.references > 0, "released more often than acquired"
        slot.references -= 1

    def warm(self, adapter: AdapterVersion) -> None:
        tracked = self._tracked[adapter.digest]
        if tracked.state is CPU:
            tracked.used_at = self._clock()
            self._load(tracked, self._pool.can_load)

    # ---- an operator's levers

    def pin(self, adapter: AdapterVersion) -> None:
        if adapter.digest not in self._cpu.pinned and len(self._cpu.pinned) >= self._pool.num_slots:
            raise ResourceExhausted(
                "TOO_MANY_PINS",
                f"{self._pool.num_slots} adapters are pinned, as many as --max-loras has slots for; unpin one first",
                field="adapter",
            )
        self._tracked.remember(adapter)
        self._cpu.pinned[adapter.digest] = None

    def unpin(self, adapter: AdapterVersion) -> None:
        self._cpu.pinned.pop(adapter.digest, None)

    def drain(self, name: str, version: int | None) -> None:
        for tracked in self._tracked.named(name, version):
            self._cpu.pinned.pop(tracked.adapter.digest, None)
            tracked.unloading = True
            if tracked.state in (CPU, GPU):
                self._tracked.move(tracked, DRAINING)

    def end_drain(self, name: str, version: int | None, *, evict: bool) -> None:
        for tracked in self._tracked.named(name, version):
            tracked.unloading = False
            if tracked.state is not DRAINING:
                continue
            digest = tracked.adapter.digest
            if evict and not self._cpu.is_claimed(digest):
                self._cpu.drop(digest)
            else:
                self._tracked.move(tracked, CPU if self._pool.get(digest) is None else GPU)

    def drop(self, name: str, version: int) -> None:
        for tracked in self._tracked.named(name, version):
            self._cpu.pinned.pop(tracked.adapter.digest, None)
            self._cpu.drop(tracked.adapter.digest)
            if tracked.state is not PULLING:
                self._disk.drop(tracked.adapter.pack_digest)
            self._tracked.settle(tracked)

    # ---- time

    def poll(self) -> None:
        for digest, error in self._pool.poll().items():
            self._fail(self._tracked[digest], error)
        for fetched in self._fetcher.ended():
            self._take_in(fetched)
        now = self._clock()
        for digest, tracked in list(self._delayed.items()):
            if tracked.attempt_at is not None and tracked.attempt_at <= now:
                tracked.attempt_at = None
                del self._delayed[digest]
                self._fetcher.start(tracked.adapter)
        for digest, tracked in list(self._failed.items()):
            if tracked.retry_at <= now:
                del self._failed[digest]
                self._tracked.move(tracked, STORE)
                if self._cpu.is_claimed(digest):
                    self._start_fetch(tracked)
        for slot in self._expiring():
            if self._tracked[slot.digest].used_at + self._idle_ttl <= now:
                self._evict(slot.digest)
        for digest in self._cpu.pinned:
            self._tend_pinned(self._tracked[digest])

    def next_deadline(self) -> float | None:
        times = [tracked.attempt_at for tracked in self._delayed.values() if tracked.attempt_at is not None]
        times += [tracked.retry_at for tracked in self._failed.values()]
        times += [self._tracked[slot.digest].used_at + self._idle_ttl for slot in self._expiring()]
        return max(0.0, min(times) - self._clock()) if times else None

    def close(self) -> None:
        self._fetcher.close()

    def list(self, waiting: Mapping[str, int]) -> list[ResidentAdapter]:
        return [self._describe(tracked, waiting.get(tracked.adapter.digest, 0)) for tracked in self._tracked]

    def _is_wanting(self, tracked: Tracked) -> bool:
        """Whether nothing brings it to host memory yet."""
        return tracked.state in (STORE, DISK) and not tracked.fetching

    def _is_at_rest(self, tracked: Tracked) -> bool:
        digest = tracked.adapter.digest
        return self._is_wanting(tracked) and not self._cpu.is_claimed(digest) and digest not in self._cpu.pinned

    def _start_fetch(self, tracked: Tracked) -> None:
        """Fetch on a worker. The fetch has a claim of its own, so its room stays even if every request gives up."""
        tracked.fetching, tracked.attempts = True, 0
        if tracked.state is STORE:
            self._tracked.move(tracked, PULLING)
        claimed = self._cpu.try_claim(tracked.adapter.digest, tracked.adapter.pack_size)
        assert claimed, "a fetch without room"
        self._fetcher.start(tracked.adapter)

    def _take_in(self, fetched: Fetched) -> None:
        tracked = self._tracked[fetched.adapter.digest]
        if fetched.pulled and tracked.state is DISK:  # what lay there was damaged, or evicted before it was read
            self._tracked.move(tracked, STORE, PULLING)
        if not isinstance(fetched.result, PackedAdapter):
            self._take_failure(tracked, fetched.result, fetched)
            return
        if tracked.state is PULLING:
            self._tracked.move(tracked, DISK)
        self._tracked.move(tracked, CPU)
        self._cpu.put(fetched.result)
        tracked.failures, tracked.error, tracked.used_at = 0, None, self._clock()
        if tracked.unloading:
            self._tracked.move(tracked, DRAINING)
        self._end_fetch(tracked)

    def _take_failure(self, tracked: Tracked, error: Exception, fetched: Fetched) -> None:
        tracked.attempts = 1 if fetched.progress else tracked.attempts + 1
        if fetched.pulled and failures.passes(error) and tracked.attempts < failures.PULL_ATTEMPTS:
            seconds = failures.delay(tracked.attempts, self._chance())
            log.warning("adapter %s: %s; again in %.2f s", tracked, error, seconds)
            tracked.attempt_at = self._clock() + seconds
            self._delayed[tracked.adapter.digest] = tracked
            return
        self._fail(tracked, error)
        self._end_fetch(tracked)

    def _end_fetch(self, tracked: Tracked) -> None:
        tracked.fetching = False
        self._cpu.unclaim(tracked.adapter.digest)

    def _fail(self, tracked: Tracked, error: Exception) -> None:
        """Leave it alone for a while: its requests fail at once. Nothing of it stays here."""
        unexpected = None if isinstance(error, MultiloraError) else error
        log.error("adapter %s: %s", tracked, error, exc_info=unexpected)
        self._tracked.move(tracked, FAILED)
        tracked.failures += 1
        tracked.error = failures.as_typed(error, str(tracked))
        tracked.retry_at = self._clock() + failures.rest(tracked.failures, error)
        self._failed[tracked.adapter.digest] = tracked
        self._cpu.discard(tracked.adapter.digest)
        self._disk.drop(tracked.adapter.pack_digest)

    def _load(self, tracked: Tracked, has_room: Callable[[PackedAdapter], bool]) -> Slot | None:
        """Copy it to a slot, if there is room. A copy that fails is the adapter's failure."""
        packed = self._cpu.get(tracked.adapter.digest)
        assert packed is not None, "acquired before it was ready"
        if not has_room(packed):
            return None
        drains = tracked.state is DRAINING
        if not drains:
            self._tracked.move(tracked, LOADING)
        try:
            slot = self._pool.load(packed)
        except Exception as error:
            self._fail(tracked, error)
            self._notify()
            return None
        if not drains:
            self._tracked.move(tracked, GPU)
        self.loads += 1
        log.info("adapter %s is in slot %d", tracked, slot.index)
        return slot

    def _make_room(self, packed: PackedAdapter) -> bool:
        """Evict idle adapters, least recently used first, until `packed` fits; False when too many are held.

        Pinned ones go only when nothing else is in the pool: pins may fill it, and keep nobody else out.
        """
        for slot in self._pool.slots():
            if self._pool.can_load(packed):
                return True
            if not slot.is_held and slot.digest not in self._cpu.pinned:
                self._evict(slot.digest)
        slots = self._pool.slots()
        if all(slot.digest in self._cpu.pinned for slot in slots):
            for slot in slots:
                if not self._pool.can_load(packed) and not slot.is_held:
                    self._evict(slot.digest)
        return self._pool.can_load(packed)

    def _make_room_unasked(self, packed: PackedAdapter) -> bool:
        """The same for a pinned adapter nobody waits for: only what no request claims makes way."""
        for slot in self._pool.slots():
            if not self._pool.can_load(packed) and self._is_idle(slot):
                self._evict(slot.digest)
        return self._pool.can_load(packed)

    def _is_idle(self, slot: Slot) -> bool:
        """Whether no request has it, and no pin keeps it."""
        return not self._cpu.is_claimed(slot.digest) and slot.digest not in self._cpu.pinned

    def _expiring(self) -> Sequence[Slot]:
        return [slot for slot in self._pool.slots() if self._is_idle(slot)] if self._idle_ttl else []

    def _tend_pinned(self, tracked: Tracked) -> None:
        if self._is_wanting(tracked):
            self.prefetch(tracked.adapter)
        elif tracked.state is CPU:
            self._load(tracked, self._make_room_unasked)

    def _on_cpu_evict(self, digest: str) -> None:
        """A copy leaves host memory, and what builds on it the pool."""
        tracked = self._tracked[digest]
        if self._pool.get(digest) is not None:
            self._evict(digest)
        if tracked.state is not FAILED:
            self._tracked.move(tracked, DISK)
            self._tracked.settle(tracked)

    def _evict(self, digest: str) -> None:
        tracked = self._tracked[digest]
        self._pool.evict(digest)
        if tracked.state is GPU:
            self._tracked.move(tracked, CPU)
        self.evictions += 1
        log.info("adapter %s left the slot pool", tracked)

    def _describe(self, tracked: Tracked, waiting: int) -> ResidentAdapter:
        self._tracked.settle(tracked)
        slot, packed = self._pool.get(tracked.adapter.digest), self._cpu.get(tracked.adapter.digest)
        return ResidentAdapter(
            adapter=tracked.adapter,
            tier=self.tier(tracked.adapter),
            slot=None if slot is None else slot.index,
            pages=0 if slot is None else slot.num_pages,
            references=0 if slot is None else slot.references,
            waiting=waiting,
            requests=tracked.requests,
            rank=0 if packed is None else packed.max_rank,
            cpu_bytes=0 if packed is None else packed.num_bytes,
            error="" if tracked.error is None else str(tracked.error),
            state=tracked.state.name,
            pinned=tracked.adapter.digest in self._cpu.pinned,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless the owners' books are right, and the states say what the books say."""
        self._pool.check_integrity()
        self._cpu.check_integrity()
        for slot in self._pool.slots():
            assert slot.digest in self._cpu, "a resident adapter is not in host memory"
            assert not slot.references or self._cpu.is_claimed(slot.digest), "a held slot is unclaimed"
        assert len(self._cpu.pinned) <= self._pool.num_slots, "more pins than slots"
        for tracked in self._tracked:
            self._check_state(tracked)

    def _check_state(self, tracked: Tracked) -> None:
        digest, state = tracked.adapter.digest, tracked.state
        in_pool, in_memory = self._pool.get(digest) is not None, digest in self._cpu
        assert in_memory == (state in (CPU, GPU, DRAINING)), f"{tracked} is {state.name}, and in memory: {in_memory}"
        assert in_pool == (state is GPU) or state is DRAINING, f"{tracked} is {state.name}, and in the pool: {in_pool}"
        assert state is not PULLING or tracked.fetching, f"{tracked} is pulled by nobody"
        assert not tracked.fetching or (state in (PULLING, DISK) and self._cpu.is_claimed(digest))
        assert (state is FAILED) == (digest in self._failed), f"{tracked} is {state.name}, and listed as failed"
        assert state is not LOADING, "a load is over before anyone can ask"
