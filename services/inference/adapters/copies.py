"""How adapters go to a GPU's pool while steps run: layer by layer, in turns.

A layer is one copy from pinned memory to a staging buffer, then one launch that scatters the buffer to its pages. The
two have a stream each and there are two buffers, so a layer is copied while the one before it is scattered.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_kernels.pool_copy import PageCopies, scatter
from services.common.memory_plan import STAGING_BUFFERS
from services.inference.model.memory import reserve

AHEAD_BYTES = 256 << 20
"""Copies begun and not done: 5 ms of a 50 GB/s link, so that is what a small adapter waits for a large one; and an 8B
model's adapter of rank 48 is begun at once, however long steps take."""

Work = Callable[[], None]


class Event(Protocol):
    """A point in a lane's work."""

    def query(self) -> bool:
        """Whether it is reached."""

    def wait(self) -> None:
        """Whatever is launched now, on the current stream, runs after it. The host goes on."""


class Lanes(Protocol):
    """Where a device does work beside its steps. A lane does its work in order, each after the events given with it;
    what is returned is reached when it is done."""

    def steps(self) -> Event:
        """All that steps have been launched by now."""

    def copy(self, work: Work, *after: Event) -> Event: ...

    def scatter(self, work: Work, *after: Event) -> Event: ...


class CudaLanes:
    """Two streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying, self._scattering = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def steps(self) -> Event:
        event: Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def copy(self, work: Work, *after: Event) -> Event:
        return _on(self._copying, work, after)

    def scatter(self, work: Work, *after: Event) -> Event:
        return _on(self._scattering, work, after)


def _on(stream: torch.cuda.Stream, work: Work, after: tuple[Event, ...]) -> Event:
    with torch.cuda.stream(stream):
        for event in after:
            event.wait()
        work()
        reached: Event = stream.record_event()
    return reached


class LayerCopy(NamedTuple):
    """A layer's way: its run of bytes, None where the adapter has nothing in it, and how its pages are filled from
    values of each dtype in the run."""

    run: Tensor | None
    pages: Mapping[torch.dtype, PageCopies]


@dataclass(eq=False)
class Load:
    """An adapter on its way.

    layer: what to copy for each of `num_layers`
    first: what else the slot needs, done before its first layer lies in the pool
    events: of the layers begun, when each lies in the pool
    error: why no more of them is begun
    """

    num_layers: int
    layer: Callable[[int], LayerCopy]
    first: Work
    events: list[Event] = field(default_factory=list)
    error: Exception | None = None

    @property
    def has_begun(self) -> bool:
        """Whether every layer has."""
        return len(self.events) == self.num_layers

    @property
    def has_arrived(self) -> bool:
        return self.has_begun and self.events[-1].query()


class StagedCopies:
    """Begins the layers of all loads in turns, one of each, so that an adapter of many ranks holds up none of few.

    pool: all of its values
    run_bytes: of the largest run that a layer can have
    """

    def __init__(self, pool: Tensor, run_bytes: int, lanes: Lanes) -> None:
        self._pool = pool
        self._lanes = lanes
        buffers = [reserve((run_bytes,), torch.uint8, pool.device) for _ in range(STAGING_BUFFERS)]
        self._buffers = itertools.cycle([_Buffer(buffer, free=lanes.steps()) for buffer in buffers])
        self._loads: deque[Load] = deque()
        self._under_way: deque[tuple[Event, int]] = deque()

    def begin(self, load: Load) -> None:
        self._loads.append(load)
        self.advance()

    def advance(self) -> None:
        """Begin as much as may be under way. A load that fails has its `error`, and no turn any more."""
        while self._loads and self._bytes_under_way() < AHEAD_BYTES:
            load = self._loads.popleft()
            self._begin_layer(load)
            if load.error is None and not load.has_begun:
                self._loads.append(load)

    def finish(self, load: Load) -> None:
        """Begin all that is left of a load, out of turn. Raises its error."""
        while load.error is None and not load.has_begun:
            self._begin_layer(load)
        self.drop(load)
        if load.error is not None:
            raise load.error

    def drop(self, load: Load) -> None:
        """Begin no more of it. What has begun goes on, and whatever comes to the same pages later comes after it."""
        if load in self._loads:
            self._loads.remove(load)

    def _begin_layer(self, load: Load) -> None:
        try:
            load.events.append(self._layer(load, load.layer(len(load.events))))
        except Exception as error:
            load.error = error

    def _layer(self, load: Load, layer: LayerCopy) -> Event:
        buffer, after = next(self._buffers), []
        if layer.run is not None:
            staged, run = buffer.values[: layer.run.numel()], layer.run
            after.append(self._lanes.copy(lambda: _copy(staged, run), buffer.free))
        is_first = not load.events
        if is_first:
            after.append(self._lanes.steps())  # what lies in its pages may be read still

        def fill() -> None:
            if is_first:
                load.first()
            for dtype, pages in layer.pages.items():
                scatter(self._pool, buffer.values.view(dtype), pages)

        buffer.free = self._lanes.scatter(fill, *after)
        self._under_way.append((buffer.free, 0 if layer.run is None else layer.run.numel()))
        return buffer.free

    def _bytes_under_way(self) -> int:
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()
        return sum(size for _, size in self._under_way)


@dataclass
class _Buffer:
    """free: when what lay in it has been scattered"""

    values: Tensor
    free: Event


def _copy(staged: Tensor, run: Tensor) -> None:
    staged.copy_(run, non_blocking=True)
