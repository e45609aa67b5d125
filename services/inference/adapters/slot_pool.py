"""The slot pool: memory for adapters' weights, set aside at start, in pages of 16 rank rows.

Per layer and linear group the pool holds `max_loras` times the pages of `max_lora_rank`. Pages are given out per
linear (q, k, v, …), the same ones in every layer, so an adapter takes what its ranks need and never the maximum; with
more slots than `max_loras`, as many adapters are resident as their pages allow.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_kernels import PAGE_ROWS, LoraWeights, PageTable
from lora_kernels.pool_copy import PageCopy, StagedRows, scatter_copies
from services.common.errors import ResourceExhausted
from services.common.packed import largest_run
from services.inference.adapters.copies import CudaLanes, Lanes, LayerCopy, Load, StagedCopies
from services.inference.adapters.direct_copy import fill
from services.inference.adapters.packed_adapter import ModuleTensors
from services.inference.model.lora import LINEAR_GROUPS, GroupShape, columns_of
from services.inference.model.memory import CPU, reserve

PLACES = {linear: (group, index) for group, linears in LINEAR_GROUPS.items() for index, linear in enumerate(linears)}
"""Of each linear, its group and its place in that."""

LayerPages = dict[torch.dtype, tuple[NDArray[np.int64], NDArray[np.int64]]]
"""A layer's page copies, and what the next layer's differ by."""


class AdapterWeights(Protocol):
    """What a slot is loaded from: a `PackedAdapter`.

    digest: content digest; ranks: highest rank of each linear over the layers
    """

    digest: str
    ranks: dict[str, int]

    def module(self, layer: int, linear: str, /) -> ModuleTensors | None: ...

    def run(self, layer: int, /) -> Tensor | None:
        """The bytes in which the tensors of a layer's modules lie; None where it has none."""


@dataclass(eq=False)
class Slot:
    """A resident adapter's place.

    pages: per linear
    references: requests that hold it in steps now
    arrived: whether its weights are there, as `poll` last saw it
    followed: whether a step was let in before they are, which waits on the device for one layer after the other
    """

    index: int
    digest: str
    pages: dict[str, tuple[int, ...]] = field(default_factory=dict)
    references: int = 0
    arrived: bool = False
    followed: bool = False

    @property
    def is_held(self) -> bool:
        """Whether it must stay: for a step, or for those who wait for a copy that is under way."""
        return bool(self.references) or not self.arrived

    @property
    def num_pages(self) -> int:
        return sum(map(len, self.pages.values()))


class SlotPool:
    """Owns the pool's tensors, its pages and its slots.

    weights: weights[layer][group], fixed in memory for the pool's life
    tables: the page table of each group
    num_slots: most adapters resident; `max_loras` unless `max_resident` says more
    lanes: where weights are copied beside steps, layer by layer; the default is what suits the device: a CPU has none,
        and copies them at once
    whole: the shapes of an adapter, of which the pool has the part of `rank`; None where `shapes` are those
    """

    def __init__(
        self,
        shapes: Mapping[str, GroupShape],
        num_layers: int,
        max_loras: int,
        max_lora_rank: int,
        dtype: torch.dtype,
        max_resident: int = 0,
        rank: int = 0,
        device: torch.device = CPU,
        lanes: Lanes | None = None,
        whole: Mapping[str, GroupShape] | None = None,
    ) -> None:
        self._rank = rank
        self.device = device
        self.num_slots = max_resident or max_loras
        self.max_lora_rank = max_lora_rank
        self.dtype = dtype
        pages_per_slot = pages_for(max_lora_rank)
        self._num_pages = max_loras * pages_per_slot
        self.tables = {group: self._table(len(LINEAR_GROUPS[group]), pages_per_slot) for group in shapes}
        slices = {group: len(shape.out_features) for group, shape in shapes.items()}
        self._ranks = {
            group: torch.zeros((num_layers, count, self.num_slots), dtype=torch.int32, device=device)
            for group, count in slices.items()
        }
        self._scales = {group: torch.zeros_like(ranks, dtype=torch.float32) for group, ranks in self._ranks.items()}
        rows = self._num_pages * PAGE_ROWS
        sizes = {group: (slices[group], rows, shape.in_features) for group, shape in shapes.items()}
        numbers = [num_layers * slices[group] * rows * shape.in_features for group, shape in shapes.items()]
        numbers += [num_layers * rows * out for shape in shapes.values() for out in shape.out_features]
        self._values = reserve((sum(numbers),), dtype, device)
        parts = iter(torch.split(self._values, numbers))
        self._a = {group: next(parts).view(num_layers, *size) for group, size in sizes.items()}
        self._b = {
            group: [next(parts).view(num_layers, rows, out) for out in shape.out_features]
            for group, shape in shapes.items()
        }
        lanes = lanes or (CudaLanes(device) if device.type == "cuda" else None)
        self._copies: StagedCopies | None = None
        if lanes is not None:
            linears = [(shape.in_features, out) for shape in (whole or shapes).values() for out in shape.out_features]
            self._copies = StagedCopies(self._values, largest_run(linears, max_lora_rank), lanes)
        self.weights = [{group: self._weights(group, layer) for group in shapes} for layer in range(num_layers)]
        self._free_pages = {linear: list(range(self._num_pages)) for group in shapes for linear in LINEAR_GROUPS[group]}
        self._free_slots = list(range(self.num_slots))
        self._slots: dict[str, Slot] = {}
        self._arriving: dict[Slot, Load] = {}
        self._generations = [0] * self.num_slots

    def get(self, digest: str) -> Slot | None:
        return self._slots.get(digest)

    def slots(self) -> Sequence[Slot]:
        """Resident adapters, least recently used first."""
        return list(self._slots.values())

    def generation(self, slot: int) -> int:
        """A number that changes whenever other weights come to lie in the slot."""
        return self._generations[slot]

    def poll(self) -> dict[str, Exception]:
        """Take in which copies have arrived, and begin more. Returns those that failed: their slots are free again."""
        if self._copies is not None:
            self._copies.advance()
        failed: dict[str, Exception] = {}
        for slot, load in list(self._arriving.items()):
            if load.error is not None:
                self.evict(slot.digest)
                is_memory = isinstance(load.error, torch.OutOfMemoryError)
                failed[slot.digest] = _no_memory() if is_memory else load.error
            elif load.has_arrived:
                slot.arrived = True
                del self._arriving[slot]
        return failed

    def may_follow(self, slot: Slot) -> bool:
        """Whether a step that comes to the layers one by one may use the slot: all its copies have begun."""
        return slot.arrived or self._arriving[slot].has_begun

    def wait(self, slots: Collection[int], layer: int = -1) -> None:
        """What is launched now, on the current stream, runs when these slots have this layer, or with -1 all of them.
        The host goes on."""
        for slot, load in self._arriving.items():
            if slot.index in slots:
                assert self._copies is not None
                self._copies.finish(load)
                load.events[layer].wait()

    def touch(self, digest: str) -> None:
        """Make the adapter the most recently used one."""
        self._slots[digest] = self._slots.pop(digest)

    def can_load(self, adapter: AdapterWeights) -> bool:
        return bool(self._free_slots) and all(
            count <= len(self._free_pages[linear]) for linear, count in _pages_needed(adapter).items()
        )

    def load(self, adapter: AdapterWeights) -> Slot:
        """Copy an adapter into a free slot, which has it when it has `arrived`; ask `can_load` first.

        Rows past its rank in a layer are zeroed.

        When the copy fails its slot and pages are free again, and the fault is raised: ResourceExhausted where the
        device had no memory for the copy's own needs. Of what fails later `poll` tells.
        """
        assert self.can_load(adapter), "no room in the pool"
        slot = Slot(self._free_slots.pop(0), adapter.digest)
        for linear, count in _pages_needed(adapter).items():
            free = self._free_pages[linear]
            slot.pages[linear] = tuple(free[:count])
            del free[:count]
        self._slots[slot.digest] = slot
        self._generations[slot.index] += 1
        try:
            self._set_table(slot)
            if self._copies is None:
                self._set_scales(slot, adapter)
                self._copy(slot, adapter)
                slot.arrived = True
            else:
                self._start(slot, adapter, self._copies)
        except torch.OutOfMemoryError as error:
            self.evict(slot.digest)
            raise _no_memory() from error
        except BaseException:
            self.evict(slot.digest)
            raise
        return slot

    def evict(self, digest: str) -> None:
        """Free an idle adapter's slot and pages. What lies in them stays until it is overwritten; nothing reads it."""
        slot = self._slots.pop(digest)
        assert not slot.references, "a held slot is not evicted"
        load = self._arriving.pop(slot, None)
        if self._copies is not None and load is not None:
            self._copies.drop(load)
        for linear, pages in slot.pages.items():
            self._free_pages[linear][:0] = pages  # the next to be used: their memory is committed already
        slot.pages = {}
        self._set_table(slot)
        for ranks in self._ranks.values():
            ranks[:, :, slot.index] = 0
        self._free_slots.append(slot.index)

    def _start(self, slot: Slot, adapter: AdapterWeights, copies: StagedCopies) -> None:
        made: dict[Hashable, tuple[int, LayerPages]] = {}

        def copy_of(layer: int) -> LayerCopy:
            """Most layers are alike: then only where their pages lie is another, and Python counts that once."""
            run = adapter.run(layer)
            modules = {linear: adapter.module(layer, linear) for linear in slot.pages}
            key = tuple(None if each is None else _place_in(run, each) for each in modules.values())
            if key not in made:
                made[key] = layer, self._pages_of(slot, modules, run, layer)
            first, pages = made[key]
            return LayerCopy(run, {dtype: copies + (layer - first) * steps for dtype, (copies, steps) in pages.items()})

        load = self._arriving[slot] = Load(
            len(self.weights),
            layer=copy_of,
            first=lambda: self._set_scales(slot, adapter),
        )
        copies.begin(load)
        if load.error is not None:
            raise load.error
        slot.arrived = load.has_arrived
        if slot.arrived:
            del self._arriving[slot]

    def _pages_of(
        self, slot: Slot, modules: Mapping[str, ModuleTensors | None], run: Tensor | None, layer: int
    ) -> LayerPages:
        """How a layer's run fills the slot's pages, by the dtype of what it holds for them."""
        made: dict[torch.dtype, tuple[list[PageCopy], list[PageCopy]]] = {}
        for linear, module in modules.items():
            pages, (group, index) = slot.pages[linear], PLACES[linear]
            copies, steps = made.setdefault(self.dtype if module is None else module.a.dtype, ([], []))
            for pool, into, rows in (
                (self._a[group], self._a[group][layer, index], None if module is None else module.a),
                (self._b[group][index], self._b[group][index][layer], None if module is None else module.b),
            ):
                copies += scatter_copies(self._values, into, pages, self._staged(run, rows, into.shape[1]))
                steps += [PageCopy(source=0, target=pool.stride(0), rows=0, width=0, stride=0)] * len(pages)
        return {dtype: (np.array(copies), np.array(steps)) for dtype, (copies, steps) in made.items()}

    def _staged(self, run: Tensor | None, rows: Tensor | None, width: int) -> StagedRows | None:
        """Where an adapter's A or B lies in its layer's run, and what of it is this rank's."""
        if run is None or rows is None:
            return None
        offset = (rows.data_ptr() - run.data_ptr()) // rows.itemsize
        rank, stride = rows.shape
        return StagedRows(offset, rank, stride, first_column=0 if stride == width else self._rank * width)

    def _copy(self, slot: Slot, adapter: AdapterWeights) -> None:
        for linear, pages in slot.pages.items():
            group, index = PLACES[linear]
            modules = [adapter.module(layer, linear) for layer in range(len(self.weights))]
            a, b = self._a[group][:, index], self._b[group][index]
            rows_of_a = [None if each is None else columns_of(each.a, a.shape[2], self._rank) for each in modules]
            rows_of_b = [None if each is None else columns_of(each.b, b.shape[2], self._rank) for each in modules]
            for number, page in enumerate(pages):
                fill(a, page, rows_of_a, number)
                fill(b, page, rows_of_b, number)

    def _set_scales(self, slot: Slot, adapter: AdapterWeights) -> None:
        for group in self.tables:
            for index, linear in enumerate(LINEAR_GROUPS[group]):
                modules = [adapter.module(layer, linear) for layer in range(len(self.weights))]
                ranks = [0 if module is None else module.rank for module in modules]
                scales = [0.0 if module is None else module.scale for module in modules]
                self._ranks[group][:, index, slot.index] = torch.tensor(ranks, dtype=torch.int32)
                self._scales[group][:, index, slot.index] = torch.tensor(scales)

    def _set_table(self, slot: Slot) -> None:
        for group, table in self.tables.items():
            for index, linear in enumerate(LINEAR_GROUPS[group]):
                pages = slot.pages.get(linear, ())
                table.pages[index][slot.index] = pages
                table.table[index, slot.index] = 0
                table.table[index, slot.index, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def _table(self, slices: int, pages_per_slot: int) -> PageTable:
        return PageTable(
            table=torch.zeros((slices, self.num_slots, pages_per_slot), dtype=torch.int32, device=self.device),
            pages=[[() for _ in range(self.num_slots)] for _ in range(slices)],
            rows_per_slice=self._num_pages * PAGE_ROWS,
        )

    def _weights(self, group: str, layer: int) -> LoraWeights:
        return LoraWeights(
            group=group,
            a=self._a[group][layer],
            b=tuple(b[layer] for b in self._b[group]),
            ranks=self._ranks[group][layer],
            scales=self._scales[group][layer],
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots and pages are each free or taken once, and the tables say the same."""
        taken = {slot.index for slot in self._slots.values()}
        assert len(taken) == len(self._slots) <= self.num_slots
        arriving = {slot for slot in self._slots.values() if not slot.arrived}
        assert self._arriving.keys() == arriving, "an arrival is lost"
        used = [slot for slot in arriving if slot.references]
        assert all(slot.followed and self._arriving[slot].has_begun for slot in used), "used too early"
        assert sorted([*taken, *self._free_slots]) == list(range(self.num_slots)), "a slot is lost or taken twice"
        for linear, free in self._free_pages.items():
            held = [page for slot in self._slots.values() for page in slot.pages.get(linear, ())]
            assert sorted([*free, *held]) == list(range(self._num_pages)), f"a page of {linear} is lost or taken twice"
        for group, table in self.tables.items():
            for index, linear in enumerate(LINEAR_GROUPS[group]):
                for slot in self._slots.values():
                    pages = slot.pages.get(linear, ())
                    assert table.pages[index][slot.index] == pages, "a page table disagrees with its slot"
                    assert tuple(table.table[index, slot.index, : len(pages)].tolist()) == pages


def pages_for(rank: int) -> int:
    """Pages that hold `rank` rows."""
    return -(-rank // PAGE_ROWS)


def _pages_needed(adapter: AdapterWeights) -> dict[str, int]:
    return {linear: pages_for(rank) for linear, rank in adapter.ranks.items()}


def _place_in(run: Tensor | None, module: ModuleTensors) -> Hashable:
    assert run is not None, "a layer with modules has a run"
    start = run.data_ptr()
    return module.rank, module.a.dtype, module.a.data_ptr() - start, module.b.data_ptr() - start


def _no_memory() -> ResourceExhausted:
    return ResourceExhausted(
        "DEVICE_MEMORY_FULL",
        "the device has no memory left to copy the adapter with; lower --gpu-memory-utilization",
        field="adapter",
    )
