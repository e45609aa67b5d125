"""Brings packed bytes to host memory, on a few workers: from this node's disk, or from the store by way of it."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from services.common.errors import DataLoss, FailedPrecondition, Unavailable
from services.inference.adapters.disk_cache import DiskCache
from services.inference.adapters.packed_adapter import BaseModelShapes, PackedAdapter
from services.inference.engine.request import AdapterVersion

log = logging.getLogger(__name__)

FETCH_WORKERS = 4


class Puller(Protocol):
    """Where packed bytes come from."""

    def pull(self, adapter: AdapterVersion, offset: int = 0) -> Iterator[bytes]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """How one attempt ended.

    pulled: whether the store was asked; the disk had it otherwise
    progress: whether the store sent anything
    """

    adapter: AdapterVersion
    result: PackedAdapter | Exception
    pulled: bool
    progress: bool


class Fetcher:
    """One attempt a call; who calls sees to it that there is one at a time for an adapter.

    notify: called from a worker's thread when an attempt has ended
    """

    def __init__(
        self, puller: Puller | None, disk: DiskCache, base: BaseModelShapes, notify: Callable[[], None]
    ) -> None:
        self._puller = puller
        self._disk = disk
        self._base = base
        self._notify = notify
        self._workers = ThreadPoolExecutor(FETCH_WORKERS, thread_name_prefix="adapter-fetch")
        self._ended: queue.SimpleQueue[Fetched] = queue.SimpleQueue()

    def start(self, adapter: AdapterVersion) -> None:
        self._workers.submit(self._run, adapter)

    def ended(self) -> Iterator[Fetched]:
        """What has ended since the last time."""
        while True:
            try:
                yield self._ended.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """Attempts that wait never start, those under way fail."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self._puller is not None:
            self._puller.close()

    def _run(self, adapter: AdapterVersion) -> None:
        result: PackedAdapter | Exception
        pulled, before = False, 0
        try:
            data = self._disk.read(adapter.pack_digest)
            if data is None:
                pulled, before = True, self._disk.kept(adapter.pack_digest)
                data = self._disk.write(adapter.pack_digest, self._pieces(adapter, before))
            result = PackedAdapter(data, adapter.digest, self._base)
        except Exception as error:
            result = error
        progress = pulled and self._disk.kept(adapter.pack_digest) > before
        self._ended.put(Fetched(adapter, result, pulled, progress))
        self._notify()

    def _pieces(self, adapter: AdapterVersion, offset: int) -> Iterator[bytes]:
        """The bytes from `offset` on, exactly as many as there should be."""
        if self._puller is None:
            raise FailedPrecondition("NO_ADAPTER_STORE", "this replica has no adapter store to pull from")
        log.info("pulling adapter %s@%d, %d bytes from %d", adapter.name, adapter.version, adapter.pack_size, offset)
        size = offset
        if size < adapter.pack_size:
            for piece in self._puller.pull(adapter, offset):
                size += len(piece)
                if size > adapter.pack_size:
                    raise DataLoss("DIGEST_MISMATCH", f"the store sent more than {adapter.pack_size} bytes; pull again")
                yield piece
        if size < adapter.pack_size:
            raise Unavailable("PULL_CUT_SHORT", f"the pull ended after {size} of {adapter.pack_size} bytes")
