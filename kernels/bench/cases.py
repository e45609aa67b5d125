"""What the kernel benchmarks measure: layers of a real model's shapes, and the batches that meet them.

Every implementation gets the same x, y and adapters; only how the adapters lie in memory is each one's own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels import PAGE_ROWS, ActiveSet, LoraWeights, PageTable
from lora_kernels.reference import LoraSlice


@dataclass(frozen=True, slots=True)
class Group:
    """A linear group: width of its input and of each slice's output."""

    width: int
    outs: tuple[int, ...]


LLAMA_8B = {
    "qkv": Group(4096, (4096, 1024, 1024)),
    "o": Group(4096, (4096,)),
    "gate_up": Group(4096, (14336, 14336)),
    "down": Group(14336, (4096,)),
}
TINY = {
    "qkv": Group(48, (48, 16, 16)),
    "o": Group(48, (48,)),
    "gate_up": Group(48, (80, 80)),
    "down": Group(80, (48,)),
}
"""For Triton's interpreter, where a program takes milliseconds."""

MIXED = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of `rows` rows over `adapters` adapters, whose ranks are `ranks` in turn.

    popularity: "equal" shares, or "zipf", whose rarest adapters may have no row
    segments: rows of an adapter lie side by side, as in prefill; else they take turns, as in decode
    """

    rows: int
    adapters: int
    ranks: tuple[int, ...]
    popularity: str = "equal"
    segments: bool = False

    @property
    def rank_of_slot(self) -> list[int]:
        return [rank for rank, _ in zip(itertools.cycle(self.ranks), range(self.adapters), strict=False)]

    @property
    def row_slots(self) -> list[int]:
        if self.popularity == "zipf":
            weights = [1 / (1 + slot) for slot in range(self.adapters)]
            slots = random.Random(0).choices(range(self.adapters), weights, k=self.rows)
        else:
            slots = [row % self.adapters for row in range(self.rows)]
        return sorted(slots) if self.segments else slots

    @property
    def sum_of_ranks(self) -> int:
        """Rank rows that such a batch must read of each linear."""
        return sum(self.rank_of_slot[slot] for slot in set(self.row_slots))


def cases(quick: bool) -> Iterator[Case]:
    """Decode from 1 to 256 rows and prefill to 8192, over adapters, ranks and popularity."""
    for rows in (1, 64) if quick else (1, 4, 16, 64, 256):
        for adapters in (1, 16, 64) if quick else (1, 4, 16, 64):
            if adapters <= rows:
                for ranks in ((16,), (64,), MIXED) if adapters >= len(MIXED) else ((16,), (64,)):
                    yield Case(rows, adapters, ranks)
    if not quick:
        yield from (Case(rows, 16, (rank,), "zipf") for rows in (64, 256) for rank in (8, 16))
    for rows in (512,) if quick else (512, 2048, 8192):
        yield from (Case(rows, adapters, (16,), segments=True) for adapters in (1, 8))
    if not quick:
        yield Case(8192, 16, MIXED, "zipf", segments=True)


@dataclass(frozen=True, slots=True)
class Layer:
    """By linear group: base weights [sum of out, in], inputs, outputs, and each slot's adapter, slice by slice."""

    base: Mapping[str, Tensor]
    x: Mapping[str, Tensor]
    y: Mapping[str, Tensor]
    adapters: Mapping[str, Sequence[Sequence[LoraSlice]]]


def build_layer(shape: Mapping[str, Group], case: Case, dtype: torch.dtype, device: torch.device) -> Layer:
    """Random, of order one: y is a base model's output, what LoRA adds to it a few tenths."""

    def values(*sizes: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, device=device) * std).to(dtype)

    def adapter(group: Group, rank: int) -> list[LoraSlice]:
        a = values(len(group.outs), rank, group.width, std=group.width**-0.5)
        return [LoraSlice(a[i], values(rank, out, std=rank**-0.5), 0.5) for i, out in enumerate(group.outs)]

    return Layer(
        base={name: values(sum(of.outs), of.width, std=of.width**-0.5) for name, of in shape.items()},
        x={name: values(case.rows, of.width) for name, of in shape.items()},
        y={name: values(case.rows, sum(of.outs)) for name, of in shape.items()},
        adapters={name: [adapter(of, rank) for rank in case.rank_of_slot] for name, of in shape.items()},
    )


def page_tables(shape: Mapping[str, Group], case: Case, device: torch.device) -> dict[str, PageTable]:
    """Pages handed out in a random order, as a pool looks that has been in use."""
    owned = [-(-rank // PAGE_ROWS) for rank in case.rank_of_slot]
    order = list(range(sum(owned)))
    random.Random(0).shuffle(order)
    pages = [tuple(order.pop() for _ in range(count)) for count in owned]
    padded = [[*of_slot, *[0] * (max(owned) - len(of_slot))] for of_slot in pages]
    table = torch.tensor(padded, dtype=torch.int32, device=device)
    return {
        name: PageTable(table.repeat(len(of.outs), 1, 1), [pages] * len(of.outs), sum(owned) * PAGE_ROWS)
        for name, of in shape.items()
    }


def paged_weights(layer: Layer, tables: Mapping[str, PageTable]) -> dict[str, LoraWeights]:
    """The layer's adapters in rank pages."""
    return {name: _paged_group(name, slots, tables[name]) for name, slots in layer.adapters.items()}


def _paged_group(name: str, slots: Sequence[Sequence[LoraSlice]], table: PageTable) -> LoraWeights:
    slices, one = len(slots[0]), slots[0][0].a
    a = one.new_zeros(slices, table.rows_per_slice, one.shape[1])
    b = tuple(one.new_zeros(table.rows_per_slice, each.b.shape[1]) for each in slots[0])
    for slot, index in itertools.product(range(len(slots)), range(slices)):
        lora = slots[slot][index]
        rows = [page * PAGE_ROWS + row for page in table.pages[index][slot] for row in range(PAGE_ROWS)]
        a[index, rows[: len(lora.a)]] = lora.a
        b[index][rows[: len(lora.b)]] = lora.b
    ranks = [[len(of_slot[index].a) for of_slot in slots] for index in range(slices)]
    scales = [[of_slot[index].scale for of_slot in slots] for index in range(slices)]
    return LoraWeights(
        name,
        a,
        b,
        torch.tensor(ranks, dtype=torch.int32, device=a.device),
        torch.tensor(scales, dtype=torch.float32, device=a.device),
    )


def active_set(case: Case, tables: Mapping[str, PageTable]) -> ActiveSet:
    return ActiveSet.build(sorted(set(case.row_slots)), tables)


def adapter_bytes(shape: Mapping[str, Group], case: Case, dtype: torch.dtype) -> int:
    """What one layer must read of the batch's adapters, each once: r * (in + out) values a linear."""
    values = sum(of.width * len(of.outs) + sum(of.outs) for of in shape.values())
    return case.sum_of_ranks * values * dtype.itemsize
