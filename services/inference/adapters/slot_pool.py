"""The slot pool: memory for adapters' weights, set aside at start, in pages of 16 rank rows.

Per layer and linear group the pool holds `max_loras` times the pages of `max_lora_rank`. Pages are given out per
linear (q, k, v, …), the same ones in every layer, so an adapter takes what its ranks need and never the maximum; with
more slots than `max_loras`, as many adapters are resident as their pages allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lora_kernels import PAGE_ROWS, LoraWeights, PageTable
from services.common.errors import ResourceExhausted
from services.inference.adapters.copies import Arrived, Copies, beside_steps
from services.inference.adapters.packed_adapter import ModuleTensors
from services.inference.model.lora import LINEAR_GROUPS, GroupShape, columns_of
from services.inference.model.memory import CPU, reserve


class AdapterWeights(Protocol):
    """What a slot is loaded from: a `PackedAdapter`.

    digest: content digest; ranks: highest rank of each linear over the layers
    """

    digest: str
    ranks: dict[str, int]

    def module(self, layer: int, linear: str, /) -> ModuleTensors | None: ...


@dataclass(eq=False)
class Slot:
    """A resident adapter's place.

    pages: per linear
    references: requests that hold it in steps now
    arrived: whether its weights are there, as `poll` last saw it; no step may use it before
    """

    index: int
    digest: str
    pages: dict[str, tuple[int, ...]] = field(default_factory=dict)
    references: int = 0
    arrived: bool = False

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
    copies: how weights go in; the default is what suits the device

    Where `shapes` are narrower than an adapter, the pool is a part of one: that of `rank`.
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
        copies: Copies | None = None,
    ) -> None:
        self._rank = rank
        self.device = device
        self._copies = copies or beside_steps(device)
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
        self._a = {
            group: reserve((num_layers, slices[group], rows, shape.in_features), dtype, device)
            for group, shape in shapes.items()
        }
        self._b = {
            group: [reserve((num_layers, rows, out), dtype, device) for out in shape.out_features]
            for group, shape in shapes.items()
        }
        self.weights = [{group: self._weights(group, layer) for group in shapes} for layer in range(num_layers)]
        self._free_pages = {linear: list(range(self._num_pages)) for group in shapes for linear in LINEAR_GROUPS[group]}
        self._free_slots = list(range(self.num_slots))
        self._slots: dict[str, Slot] = {}
        self._arriving: dict[Slot, Arrived] = {}
        self._generations = [0] * self.num_slots

    def get(self, digest: str) -> Slot | None:
        return self._slots.get(digest)

    def slots(self) -> Sequence[Slot]:
        """Resident adapters, least recently used first."""
        return list(self._slots.values())

    def generation(self, slot: int) -> int:
        """A number that changes whenever other weights come to lie in the slot."""
        return self._generations[slot]

    def poll(self) -> None:
        """Take in which copies have arrived."""
        for slot, arrived in list(self._arriving.items()):
            if arrived():
                slot.arrived = True
                del self._arriving[slot]

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
        device had no memory for the copy's own buffers.
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
            self._arriving[slot] = self._copies(lambda: self._copy(slot, adapter))
            self.poll()
        except torch.OutOfMemoryError as error:
            self.evict(slot.digest)
            raise ResourceExhausted(
                "DEVICE_MEMORY_FULL",
                "the device has no memory left to copy the adapter with; lower --gpu-memory-utilization",
                field="adapter",
            ) from error
        except BaseException:
            self.evict(slot.digest)
            raise
        return slot

    def evict(self, digest: str) -> None:
        """Free an idle adapter's slot and pages. What lies in them stays until it is overwritten; nothing reads it."""
        slot = self._slots.pop(digest)
        assert not slot.references, "a held slot is not evicted"
        self._arriving.pop(slot, None)
        for linear, pages in slot.pages.items():
            self._free_pages[linear][:0] = pages  # the next to be used: their memory is committed already
        slot.pages = {}
        self._set_table(slot)
        for ranks in self._ranks.values():
            ranks[:, :, slot.index] = 0
        self._free_slots.append(slot.index)

    def _copy(self, slot: Slot, adapter: AdapterWeights) -> None:
        """A step waits for it: a linear's rows go in with one call for all layers, where they lie evenly apart."""
        for group in self.tables:
            for index, linear in enumerate(LINEAR_GROUPS[group]):
                modules = [adapter.module(layer, linear) for layer in range(len(self.weights))]
                ranks = [0 if module is None else module.rank for module in modules]
                scales = [0.0 if module is None else module.scale for module in modules]
                self._ranks[group][:, index, slot.index] = torch.tensor(ranks, dtype=torch.int32)
                self._scales[group][:, index, slot.index] = torch.tensor(scales)
                a, b = self._a[group][:, index], self._b[group][index]
                rows_of_a = [None if each is None else columns_of(each.a, a.shape[2], self._rank) for each in modules]
                rows_of_b = [None if each is None else columns_of(each.b, b.shape[2], self._rank) for each in modules]
                for number, page in enumerate(slot.pages.get(linear, ())):
                    _fill(a, page, rows_of_a, number)
                    _fill(b, page, rows_of_b, number)

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
        assert self._arriving.keys() == arriving and not any(slot.references for slot in arriving), "used too early"
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


def _fill(pool: Tensor, page: int, rows: Sequence[Tensor | None], number: int) -> None:
    """Copy the rows of an adapter's page `number` to a page of the pool [layers, rows, width]; what they leave of it is
    zeroed."""
    to = pool[:, page * PAGE_ROWS : (page + 1) * PAGE_ROWS]
    if (together := _together(rows)) is not None and together.device == to.device:
        _fill_page(to, together, number)
    else:
        for layer, part in enumerate(rows):
            _fill_page(to[layer], to[layer, :0] if part is None else part, number)


def _fill_page(page: Tensor, rows: Tensor, number: int) -> None:
    here = max(0, min(PAGE_ROWS, rows.shape[-2] - number * PAGE_ROWS))
    if here:
        page[..., :here, :].copy_(rows.narrow(-2, number * PAGE_ROWS, here), non_blocking=True)
    if here < PAGE_ROWS:
        page[..., here:, :].zero_()


def _together(layers: Sequence[Tensor | None]) -> Tensor | None:
    """All layers' rows as one view [layers, rows, width], where they are alike and lie evenly apart in one memory."""
    first = layers[0]
    if first is None:
        return None
    starts = []
    for rows in layers:
        if rows is None or rows.shape != first.shape or rows.dtype != first.dtype:
            return None
        starts.append(rows.data_ptr())
    apart, memory = (starts[-1] - starts[0]) // max(1, len(starts) - 1), first.untyped_storage()
    evenly = apart > 0 and all(start == starts[0] + number * apart for number, start in enumerate(starts))
    if not evenly or starts[-1] >= memory.data_ptr() + memory.nbytes():
        return None
    return first.as_strided((len(layers), *first.shape), (apart // first.itemsize, *first.stride()))
