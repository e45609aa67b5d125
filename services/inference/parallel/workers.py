"""The other ranks as rank 0 has them: processes that do each step beside it, and die with it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from services.common.errors import Internal
from services.inference.adapters.slot_pool import AdapterWeights, Slot, SlotPool
from services.inference.config import EXIT_ENGINE_DIED, ServerConfig
from services.inference.hosting.wire import encode, receive
from services.inference.model.config import ModelConfig
from services.inference.model.decoder import ForwardBatch
from services.inference.model.gpu_runner import GpuRunner, Share, StepLogits
from services.inference.model.runner import ModelRunner
from services.inference.parallel.collectives import join, leave
from services.inference.parallel.messages import Begin, Evict, Failed, Forward, Join, Load, Loaded
from services.inference.parallel.shard import Shard

log = logging.getLogger(__name__)

T = TypeVar("T")

DEATH_SECONDS = 10.0
"""How long the engine may take to end after a rank has: it may wait for that rank in a collective that NCCL never ends.
Gloo ends its own at once."""


class Workers:
    """Starts ranks 1 to size - 1 at once; `join` waits until they have loaded their parts.

    shard: rank 0's
    on_death: called once, from a thread, with why a rank has ended before `close`
    """

    def __init__(self, config: ServerConfig, model: ModelConfig, shard: Shard, on_death: Callable[[str], None]) -> None:
        self._device = config.device
        self.shard = shard
        self._on_death = on_death
        self._directory = tempfile.TemporaryDirectory(prefix="multilora-ranks-")
        self._meeting = Path(self._directory.name, "meeting")
        self._met = threading.Event()
        self._closed = threading.Event()
        self._dead = threading.Event()
        self._death = ""
        self._lock = threading.Lock()
        self._workers = [_Worker(rank) for rank in range(1, shard.size)]
        self._loaded = [threading.Event() for _ in self._workers]
        for worker in self._workers:
            part = Shard(worker.rank, shard.size, shard.fully_sharded)
            worker.send(encode(Begin(config, model, part, self._meeting)))
        for worker, loaded in zip(self._workers, self._loaded, strict=True):
            name = f"rank-{worker.rank}"
            threading.Thread(target=self._watch, args=(worker, loaded), name=name, daemon=True).start()

    def join(self) -> None:
        """Raises Internal when a rank has ended instead."""
        for loaded in self._loaded:
            loaded.wait()
        self.check()
        self._met.set()
        self.send(Join())
        join(self.shard, self._meeting, self._device)

    def send(self, message: object) -> None:
        """To every rank, which takes messages in the order they were sent."""
        data = encode(message)
        for worker in self._workers:
            worker.send(data)

    def check(self) -> None:
        """Raise Internal when a rank has ended."""
        if self._dead.is_set():
            raise Internal("RANK_DIED", self._death)

    def beside(self, forward: Callable[..., T], *arguments: Any) -> T:
        """Call `forward` here while the other ranks call theirs. Raises Internal when a rank has ended."""
        self.check()
        self.send(Forward(arguments))
        try:
            return forward(*arguments)
        except RuntimeError as error:
            raise self._blame(error) from error

    def _blame(self, error: Exception) -> Exception:
        """Why a collective failed: the rank that has ended, where one has, within a moment."""
        return Internal("RANK_DIED", self._death) if self._dead.wait(DEATH_SECONDS / 2) else error

    def close(self) -> None:
        """End the ranks; more than once is once."""
        if self._closed.is_set():
            return
        self._closed.set()
        for worker in self._workers:
            worker.close()
        leave()
        self._directory.cleanup()

    def _watch(self, worker: _Worker, loaded: threading.Event) -> None:
        said = ""
        for message in receive(worker.connection):
            if isinstance(message, Loaded):
                loaded.set()
            elif isinstance(message, Failed):
                said = f": {message.error}"
        fate = worker.fate()
        if not self._closed.is_set():
            self._mourn(f"rank {worker.rank} of {self.shard.size} {fate}{said}")

    def _mourn(self, death: str) -> None:
        with self._lock:
            if self._death:
                return  # the others end because the first did
            self._death = death
        log.error("%s; all ranks end with it", death)
        self._dead.set()
        for loaded in self._loaded:
            loaded.set()
        self._on_death(death)
        if self._met.is_set() and not self._closed.wait(DEATH_SECONDS):
            os._exit(EXIT_ENGINE_DIED)


class _Worker:
    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "services.inference.parallel.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__,
                process_group=0,  # the terminal's SIGINT is for the face
            )

    def send(self, data: bytes) -> None:
        """What a rank that has ended is sent is lost; whoever reads `connection` hears of its end."""
        with contextlib.suppress(ConnectionError):
            self.connection.sendall(data)

    def fate(self) -> str:
        code = self._process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        self.connection.close()


class MirroredPool(SlotPool):
    """Rank 0's part of the slot pool. What it loads and evicts, the others do too, and so give out the same pages."""

    def __init__(self, workers: Workers, **settings: Any) -> None:
        """settings: `SlotPool`'s"""
        super().__init__(**settings)
        self._workers = workers

    def load(self, adapter: AdapterWeights) -> Slot:
        self._workers.send(Load(adapter))
        return super().load(adapter)

    def evict(self, digest: str) -> None:
        self._workers.send(Evict(digest))
        super().evict(digest)


class ParallelRunner(ModelRunner):
    """Rank 0's share of each step; the other ranks are told to do theirs beside it, and rank 0 alone samples."""

    def __init__(self, workers: Workers, *arguments: Any) -> None:
        """arguments: `ModelRunner`'s"""
        super().__init__(*arguments)
        self._workers = workers

    def forward(self, batch: ForwardBatch, row_slots: Tensor) -> Tensor:
        """Raises Internal when a rank has ended."""
        return self._workers.beside(super().forward, batch, row_slots)


class ParallelGpuRunner(GpuRunner):
    """The same on GPUs, one a rank."""

    def __init__(self, workers: Workers, *arguments: Any, **settings: Any) -> None:
        """arguments, settings: `GpuRunner`'s"""
        self._workers = workers
        super().__init__(*arguments, **settings)

    def forward(self, step: Sequence[Share]) -> StepLogits:
        """Raises Internal when a rank has ended."""
        return self._workers.beside(super().forward, step)
