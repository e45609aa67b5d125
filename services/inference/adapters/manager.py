"""Brings adapters from the store to this node's disk, to host memory, to the slot pool: each step one owner's, and the
order of steps this file's.

The engine's thread calls everything here; only fetches run elsewhere, on a few workers, and meet the engine's thread
again in `poll`. What is in the pool is also in host memory, so a slot can always be given up.
"""

from __future__ import annotations

import logging
import queue
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from services.common.errors import Internal, MultiloraError
from services.inference.adapters.cpu_cache import CpuCache
from services.inference.adapters.disk_cache import DiskCache
from services.inference.adapters.packed_adapter import BaseModelShapes, PackedAdapter
from services.inference.adapters.slot_pool import SlotPool
from services.inference.engine.messages import ResidentAdapter
from services.inference.engine.request import AdapterVersion

log = logging.getLogger(__name__)

FETCH_WORKERS = 4
MAX_REMEMBERED = 10_000
"""Versions whose names and request counts are kept for `list`."""


class Puller(Protocol):
    """Where packed bytes come from."""

    def pull(self, adapter: AdapterVersion, offset: int = 0) -> Iterator[bytes]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Fetched:
    adapter: AdapterVersion
    result: PackedAdapter | Exception


@dataclass(slots=True)
class _Known:
    adapter: AdapterVersion
    requests: int = 0
    error: str = ""


class AdapterManager:
    """The engine's view of adapters: claims on host memory, and slots. See `engine.interfaces.Adapters`.

    notify: called from a worker's thread when a fetch has ended
    """

    def __init__(
        self,
        puller: Puller | None,
        disk: DiskCache,
        pool: SlotPool,
        base: BaseModelShapes,
        max_cpu_loras: int,
        notify: Callable[[], None],
    ) -> None:
        self._puller = puller
        self._disk = disk
        self._pool = pool
        self._base = base
        self._cpu = CpuCache(max_cpu_loras, self._on_cpu_evict)
        self._notify = notify
        self._workers = ThreadPoolExecutor(FETCH_WORKERS, thread_name_prefix="adapter-fetch")
        self._fetching: set[str] = set()
        self._fetched: queue.SimpleQueue[_Fetched] = queue.SimpleQueue()
        self._failures: dict[str, Exception] = {}
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self.evictions = 0
        self.loads = 0

    def tier(self, adapter: AdapterVersion) -> str:
        if self._pool.get(adapter.digest) is not None:
            return "GPU"
        if adapter.digest in self._cpu:
            return "CPU"
        return "DISK" if adapter.pack_digest in self._disk else "STORE"

    def prefetch(self, adapter: AdapterVersion) -> None:
        if adapter.digest in self._cpu or adapter.digest in self._fetching or not self._cpu.try_claim(adapter.digest):
            return
        self._remember(adapter)
        self._start_fetch(adapter)
        self._unclaim(adapter.digest)

    def drop(self, name: str, version: int) -> None:
        for known in list(self._known.values()):
            adapter = known.adapter
            if (adapter.name, adapter.version) == (name, version):
                self._cpu.drop(adapter.digest)
                self._disk.drop(adapter.pack_digest)

    def try_claim(self, adapter: AdapterVersion) -> bool:
        if not self._cpu.try_claim(adapter.digest):
            return False
        self._remember(adapter).requests += 1
        if adapter.digest not in self._cpu and adapter.digest not in self._fetching:
            self._start_fetch(adapter)
        return True

    def unclaim(self, adapter: AdapterVersion) -> None:
        self._unclaim(adapter.digest)

    def is_ready(self, adapter: AdapterVersion) -> bool:
        return adapter.digest in self._cpu

    def failure(self, adapter: AdapterVersion) -> Exception | None:
        return self._failures.get(adapter.digest)

    def acquire(self, adapter: AdapterVersion) -> int | None:
        slot = self._pool.get(adapter.digest)
        if slot is None:
            packed = self._cpu.get(adapter.digest)
            assert packed is not None, "acquired before it was ready"
            if not self._make_room(packed):
                return None
            slot = self._pool.load(packed)
            self.loads += 1
            log.info("adapter %s@%d is in slot %d", adapter.name, adapter.version, slot.index)
        slot.references += 1
        self._pool.touch(adapter.digest)
        self._cpu.touch(adapter.digest)
        return slot.index

    def release(self, adapter: AdapterVersion) -> None:
        slot = self._pool.get(adapter.digest)
        assert slot is not None and slot.references > 0, "released more often than acquired"
        slot.references -= 1

    def poll(self) -> None:
        while True:
            try:
                fetched = self._fetched.get_nowait()
            except queue.Empty:
                return
            self._take_in(fetched)

    def list(self, waiting: Mapping[str, int]) -> list[ResidentAdapter]:
        return [self._describe(known, waiting.get(digest, 0)) for digest, known in reversed(self._known.items())]

    def close(self) -> None:
        """End the fetches: those that wait never start, those under way fail."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self._puller is not None:
            self._puller.close()

    def _remember(self, adapter: AdapterVersion) -> _Known:
        known = self._known.setdefault(adapter.digest, _Known(adapter))
        self._known.move_to_end(adapter.digest)
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return known

    def _start_fetch(self, adapter: AdapterVersion) -> None:
        """Fetch on a worker. The fetch has a claim of its own, so its room stays even if every request gives up."""
        self._fetching.add(adapter.digest)
        self._failures.pop(adapter.digest, None)
        self._cpu.try_claim(adapter.digest)
        self._workers.submit(self._fetch, adapter)

    def _fetch(self, adapter: AdapterVersion) -> None:
        result: PackedAdapter | Exception
        try:
            data = self._disk.read(adapter.pack_digest)
            if data is None:
                if self._puller is None:
                    raise Internal("NO_ADAPTER_STORE", "this replica has no adapter store to pull from")
                log.info("pulling adapter %s@%d, %d bytes", adapter.name, adapter.version, adapter.pack_size)
                data = self._disk.write(adapter.pack_digest, self._puller.pull(adapter))
            result = PackedAdapter(data, adapter.digest, self._base)
        except MultiloraError as error:
            error.field = error.field or "adapter"
            error.metadata.setdefault("adapter", f"{adapter.name}@{adapter.version}")
            result = error
        except Exception as error:
            result = error
        self._fetched.put(_Fetched(adapter, result))
        self._notify()

    def _take_in(self, fetched: _Fetched) -> None:
        digest = fetched.adapter.digest
        self._fetching.discard(digest)
        known = self._known.get(digest)
        if isinstance(fetched.result, PackedAdapter):
            self._cpu.put(fetched.result)
            error = ""
        else:
            error = str(fetched.result)
            unexpected = None if isinstance(fetched.result, MultiloraError) else fetched.result
            log.error("adapter %s: %s", f"{fetched.adapter.name}@{fetched.adapter.version}", error, exc_info=unexpected)
            self._failures[digest] = fetched.result
        if known is not None:
            known.error = error
        self._unclaim(digest)

    def _unclaim(self, digest: str) -> None:
        """A failure is remembered as long as someone waits for its news; the next request tries again."""
        self._cpu.unclaim(digest)
        if not self._cpu.is_claimed(digest):
            self._failures.pop(digest, None)

    def _make_room(self, packed: PackedAdapter) -> bool:
        """Evict idle adapters, least recently used first, until `packed` fits; False when too many are held."""
        for slot in self._pool.slots():
            if self._pool.can_load(packed):
                break
            if not slot.references:
                self._evict(slot.digest)
        return self._pool.can_load(packed)

    def _on_cpu_evict(self, digest: str) -> None:
        if self._pool.get(digest) is not None:
            self._evict(digest)

    def _evict(self, digest: str) -> None:
        self._pool.evict(digest)
        self.evictions += 1
        log.info("adapter %s left the slot pool", digest)

    def _describe(self, known: _Known, waiting: int) -> ResidentAdapter:
        slot, packed = self._pool.get(known.adapter.digest), self._cpu.get(known.adapter.digest)
        return ResidentAdapter(
            adapter=known.adapter,
            tier=self.tier(known.adapter),
            slot=None if slot is None else slot.index,
            pages=0 if slot is None else slot.num_pages,
            references=0 if slot is None else slot.references,
            waiting=waiting,
            requests=known.requests,
            rank=0 if packed is None else packed.max_rank,
            cpu_bytes=0 if packed is None else packed.num_bytes,
            error=known.error,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless both owners' books are right, and every resident adapter is in host memory."""
        self._pool.check_integrity()
        self._cpu.check_integrity()
        for slot in self._pool.slots():
            assert slot.digest in self._cpu, "a resident adapter is not in host memory"
            assert not slot.references or self._cpu.is_claimed(slot.digest), "a held slot is unclaimed"
