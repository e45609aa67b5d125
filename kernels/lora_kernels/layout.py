"""How resident adapters lie in memory, and how a batch names the ones it uses.

A *linear group* is the set of linears that read the same input: `qkv` has the slices q, k and v; `gate_up` has gate
and up; `o` and `down` have one slice. Per layer and group the pool holds rank rows in pages of `PAGE_ROWS`:

    a: [slices, pages * PAGE_ROWS, in]          row = one rank of one adapter's A
    b: slices x [pages * PAGE_ROWS, out_slice]  row = the same rank of its B, stored transposed

An adapter of rank r owns ceil(r / PAGE_ROWS) pages of each slice it has, the same pages in every layer; rows past its
rank in a layer are zero in both A and B. Which pages is the `PageTable`'s to say, one per group, shared by the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lora_kernels.work_list import BASE_ROW, WorkList

PAGE_ROWS = 16
"""Rank rows in a page: the smallest tile a tensor core multiplies, so a rank costs at most 15 rows of padding."""


@dataclass(frozen=True, eq=False, slots=True)
class LoraWeights:
    """One linear group of one layer, for every slot of the pool.

    group: name of the linear group, the key of its `PageTable`
    a: [slices, pages * PAGE_ROWS, in], pool dtype
    b: per slice [pages * PAGE_ROWS, out_slice], pool dtype
    ranks: [slices, slots] int32; 0 where the slot's adapter lacks this linear in this layer
    scales: [slices, slots] float32; multiplies the shrink result
    """

    group: str
    a: Tensor
    b: tuple[Tensor, ...]
    ranks: Tensor
    scales: Tensor

    @property
    def slices(self) -> int:
        return len(self.b)


@dataclass(frozen=True, eq=False, slots=True)
class PageTable:
    """Which pages a slot owns in each slice of one group.

    table: [slices, slots, max_pages] int32 on the pool's device, unused entries 0; a fixed address for the kernels
    pages: pages[slice][slot], the same on the host
    rows_per_slice: rank rows the pool holds for one slice, pages * PAGE_ROWS
    """

    table: Tensor
    pages: list[list[tuple[int, ...]]]
    rows_per_slice: int


@dataclass(frozen=True, eq=False, slots=True)
class RankRows:
    """The rank rows of one group that an active set reads, slice after slice.

    rows: [R] int64 into `LoraWeights.a` flattened to [slices * pages * PAGE_ROWS, in]
    owners: [R] int32, the slot each row belongs to
    bounds: slices + 1 offsets into `rows`
    spans: per slice, where each slot's rows lie within the slice's; slots that have none are left out
    """

    rows: Tensor
    owners: Tensor
    bounds: tuple[int, ...]
    spans: tuple[Mapping[int, tuple[int, int]], ...]


@dataclass(frozen=True, eq=False, slots=True)
class GatheredWeights:
    """An active set's rank rows of one layer's group, laid side by side for dense products.

    a: [R, in] float32, times its scale;  b: per slice [R_slice, out_slice] float32
    finite: no inf or NaN in any b, so zeros can stand for the ranks a row must not see
    """

    a: Tensor
    b: tuple[Tensor, ...]
    finite: bool


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The slots a batch uses. Built when that set, or what lies in one of its slots, changes; not every step.

    slots: distinct slots, in any order
    tables: the page table of every group
    most_pages: per group, the most pages that one of the slots owns in a slice

    What the torch path gathers from the pool is kept here, so decoding with an unchanged set copies no weights. The
    kernels read the pool in place and never ask for it.
    """

    slots: tuple[int, ...]
    tables: Mapping[str, PageTable]
    most_pages: Mapping[str, int] = field(default_factory=dict)
    gathered: dict[LoraWeights, GatheredWeights] = field(default_factory=dict)
    _rank_rows: dict[str, RankRows] = field(default_factory=dict, init=False)

    @classmethod
    def build(cls, slots: Sequence[int], tables: Mapping[str, PageTable]) -> ActiveSet:
        most_pages = {
            name: max((len(pages_of_slot[slot]) for pages_of_slot in table.pages for slot in slots), default=0)
            for name, table in tables.items()
        }
        return cls(tuple(slots), tables, most_pages)

    def rank_rows(self, group: str) -> RankRows:
        """The rank rows of the set's slots in one group's pool, collected on first use."""
        if group not in self._rank_rows:
            self._rank_rows[group] = _rank_rows(self.slots, self.tables[group])
        return self._rank_rows[group]

    @cached_property
    def pages_of_slot(self) -> list[int]:
        """[slots of the pool], each active slot's pages in its widest slice of any group; 0 for the others."""
        pages = [0] * max(len(of_slot) for table in self.tables.values() for of_slot in table.pages)
        for slot in self.slots:
            pages[slot] = max(len(of_slot[slot]) for table in self.tables.values() for of_slot in table.pages)
        return pages


@dataclass(eq=False)
class LoraBatch:
    """One forward pass: which slot each row of the batch uses.

    row_slots: [rows] int32, `BASE_ROW` for the base model
    work: the kernels' work list, where it lies in fixed buffers; else the first layer that asks makes the batch's own,
        shared by all the others
    sum_shrunk: where A is cut by its inputs among processes that each have the columns of x for their part: adds up
        their shrink results, float32, in place
    """

    row_slots: Tensor
    active: ActiveSet
    work: WorkList | None = None
    sum_shrunk: Callable[[Tensor], object] | None = None
    _foreign: dict[str, Tensor] = field(default_factory=dict, init=False)

    @cached_property
    def segments(self) -> list[tuple[int, int, int]]:
        """Runs of rows with the same adapter, (slot, first row, end), the base model's left out."""
        slots, counts = torch.unique_consecutive(self.row_slots, return_counts=True)
        ends = counts.cumsum(0)
        runs = zip(slots.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
        return [run for run in runs if run[0] != BASE_ROW]

    def foreign(self, group: str) -> Tensor:
        """[rows, R] bool: True where a rank row of the group is not the own adapter's; the same in every layer."""
        if group not in self._foreign:
            self._foreign[group] = self.row_slots[:, None] != self.active.rank_rows(group).owners
        return self._foreign[group]


def _rank_rows(slots: Sequence[int], table: PageTable) -> RankRows:
    rows: list[int] = []
    owners: list[int] = []
    bounds = [0]
    spans: list[dict[int, tuple[int, int]]] = []
    for index, pages_of_slot in enumerate(table.pages):
        slice_start = index * table.rows_per_slice
        spans.append({})
        for slot in slots:
            if pages_of_slot[slot]:
                first = len(rows) - bounds[-1]
                spans[-1][slot] = first, first + len(pages_of_slot[slot]) * PAGE_ROWS
            for page in pages_of_slot[slot]:
                first = slice_start + page * PAGE_ROWS
                rows.extend(range(first, first + PAGE_ROWS))
                owners.extend([slot] * PAGE_ROWS)
        bounds.append(len(rows))
    device = table.table.device
    return RankRows(
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(owners, dtype=torch.int32, device=device),
        tuple(bounds),
        tuple(spans),
    )
