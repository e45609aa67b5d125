"""Small pools of random adapters for the kernel tests: scattered pages, poison wherever no adapter lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels import PAGE_ROWS, ActiveSet, LoraBatch, LoraWeights, PageTable
from lora_kernels.reference import TOLERANCES, LoraSlice, apply_lora_reference

GROUP = "group"
UNUSED_PAGES = 3


@dataclass(frozen=True)
class Pool:
    """A filled pool, and the same adapters un-paged for the reference."""

    weights: LoraWeights
    table: PageTable
    adapters: dict[int, list[LoraSlice | None]]

    @property
    def out_sizes(self) -> list[int]:
        return [b.shape[1] for b in self.weights.b]

    def batch(self, row_slots: Sequence[int], active: Sequence[int] | None = None) -> LoraBatch:
        """`active` may name more slots than the rows use, in any order."""
        slots = sorted({slot for slot in row_slots if slot >= 0}) if active is None else active
        return LoraBatch(
            row_slots=torch.tensor(row_slots, dtype=torch.int32), active=ActiveSet.build(slots, {GROUP: self.table})
        )

    def inputs(self, rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Random y [rows, sum of out] and x [rows, in]; the first rows are the same whatever `rows` is."""
        made = torch.Generator().manual_seed(seed)
        width = sum(self.out_sizes) + self.weights.a.shape[2]
        values = torch.randn(rows, width, generator=made).to(self.weights.a.dtype)
        y, x = values.split([sum(self.out_sizes), self.weights.a.shape[2]], dim=1)
        return y.contiguous(), x.contiguous()

    def reference(self, y: Tensor, x: Tensor, row_slots: Sequence[int]) -> Tensor:
        return apply_lora_reference(y, x, row_slots, self.adapters, self.out_sizes)


def build_pool(
    ranks: Sequence[Sequence[int]],
    width: int,
    out_sizes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pages_of_ranks: Sequence[Sequence[int]] | None = None,
) -> Pool:
    """A pool with one adapter a slot.

    ranks: ranks[slot][slice], 0 for a slice the adapter lacks
    pages_of_ranks: the ranks its pages were taken for, where another layer has more than this one
    """
    made = torch.Generator().manual_seed(seed)
    slots, slices = len(ranks), len(out_sizes)
    owned = [[-(-rank // PAGE_ROWS) for rank in of_slot] for of_slot in (pages_of_ranks or ranks)]
    pages = max(sum(of_slot[index] for of_slot in owned) for index in range(slices)) + UNUSED_PAGES
    rows = pages * PAGE_ROWS

    weights = LoraWeights(
        group=GROUP,
        a=torch.full((slices, rows, width), torch.nan, dtype=dtype),
        b=tuple(torch.full((rows, out), torch.nan, dtype=dtype) for out in out_sizes),
        ranks=torch.tensor(ranks, dtype=torch.int32).T.contiguous(),
        scales=torch.rand(slices, slots, generator=made) + 0.5,
    )
    most_pages = max(1, max(max(of_slot) for of_slot in owned))
    table = PageTable(torch.zeros(slices, slots, most_pages, dtype=torch.int32), [[] for _ in out_sizes], rows)
    adapters: dict[int, list[LoraSlice | None]] = {slot: [] for slot in range(slots)}
    for index, out in enumerate(out_sizes):
        free = (torch.randperm(pages - 1, generator=made) + 1).tolist()  # page 0, the table's filler, stays poisoned
        for slot in range(slots):
            taken = tuple(free.pop() for _ in range(owned[slot][index]))
            table.pages[index].append(taken)
            table.table[index, slot, : len(taken)] = torch.tensor(taken, dtype=torch.int32)
            rank = ranks[slot][index]
            a = (torch.randn(rank, width, generator=made) / width**0.5).to(dtype)
            b = (torch.randn(rank, out, generator=made) / max(rank, 1) ** 0.5).to(dtype)
            scale = float(weights.scales[index, slot])
            adapters[slot].append(LoraSlice(a, b, scale) if rank else None)
            _write(weights.a[index], a, taken)
            _write(weights.b[index], b, taken)
    return Pool(weights, table, adapters)


def poison(pool: Pool, slot: int, value: float) -> None:
    """Put `value` into a slot's A and B, in the pool only."""
    for index, pages_of_slot in enumerate(pool.table.pages):
        for page in pages_of_slot[slot]:
            pool.weights.a[index, page * PAGE_ROWS] = value
            pool.weights.b[index][page * PAGE_ROWS] = value


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare with the reference by the one table of tolerances."""
    rtol, atol = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


def bits(values: Tensor) -> Tensor:
    """Values as integers, so that equal means bitwise equal, NaN and signed zero included."""
    return values.view(torch.int32 if values.dtype is torch.float32 else torch.int16)


def _write(pool_rows: Tensor, values: Tensor, pages: Sequence[int]) -> None:
    """Lay rank rows into pages, zeroing the tail of the last as the pool does."""
    for index, page in enumerate(pages):
        part = values[index * PAGE_ROWS : (index + 1) * PAGE_ROWS]
        rows = pool_rows[page * PAGE_ROWS : (page + 1) * PAGE_ROWS]
        rows.zero_()
        rows[: len(part)] = part
