"""What a CUDA graph would record of a linear group: the same for every batch, so that one graph serves them all.

A graph repeats the launches, with their grids, numbers and addresses, and the allocations; it repeats no Python. So
here the launches are written down and everything torch is asked for meanwhile; on a GPU, `test_cuda.py` captures.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import BASE_ROW, LoraBatch, WorkList
from tests.kernels.path_contract import MIXED_RANKS, QKV
from tests.kernels.pool_builder import build_pool

ROWS = 8
BATCHES = [
    [0, 1, 2, 3, 4, BASE_ROW, 1, 1],
    [BASE_ROW] * ROWS,
    [3] * ROWS,
    [4] * ROWS,  # a slot with no adapter in it
    [2],
]


class AskedOfTorch(TorchDispatchMode):
    """Every operation, with the shape it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        self.operations.append((str(function), tuple(made.shape) if isinstance(made, Tensor) else ()))
        return made


class WrittenDown:
    """Stands where a kernel does and keeps what it would be launched with."""

    def __init__(self, launches: list[object], made_meanwhile: Callable[[Tensor], bool]) -> None:
        self._launches = launches
        self._made_meanwhile = made_meanwhile

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object, **named: object) -> None:
            fixed = {name: self._fixed(argument) for name, argument in named.items()}
            self._launches.append((grid, [self._fixed(argument) for argument in arguments], fixed))

        return launch

    def _fixed(self, argument: object) -> object:
        if not isinstance(argument, Tensor):
            return argument
        return tuple(argument.shape) if self._made_meanwhile(argument) else argument.data_ptr()


def test_every_batch_is_the_same_to_a_graph(triton_path: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait for the device, no launch that depends on what a batch holds, one allocation of one size."""
    pool = build_pool(MIXED_RANKS, 40, QKV)
    work = WorkList.allocate(ROWS, len(MIXED_RANKS), 4, torch.device("cpu"))
    y, x = pool.inputs(ROWS)
    weights = pool.weights
    known = {each.data_ptr() for each in (y, x, weights.a, *weights.b, weights.ranks, weights.scales)}
    known |= {each.data_ptr() for each in (pool.table.table, work.order, work.tiles, work.items, work.counts)}
    launches: list[object] = []
    recorder = WrittenDown(launches, lambda tensor: tensor.data_ptr() not in known)
    monkeypatch.setattr(triton_path.triton_shrink, "shrink_kernel", recorder)
    monkeypatch.setattr(triton_path.triton_expand, "expand_kernel", recorder)

    recorded = []
    for row_slots in BATCHES:
        active = pool.batch(row_slots).active
        assert work.stage(row_slots, active.pages_of_slot)
        batch = LoraBatch(torch.full((ROWS,), BASE_ROW, dtype=torch.int32), active, work)
        launches.clear()
        with AskedOfTorch() as asked:
            triton_path.apply_lora_triton(y, x, weights, batch)
        recorded.append((list(launches), asked.operations))
    assert len(recorded[0][0]) == 2
    assert recorded[0][1] == [("aten.empty.memory_format", (len(QKV), 1, ROWS, 64))]
    assert all(each == recorded[0] for each in recorded)
