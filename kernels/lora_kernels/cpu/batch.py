"""What one step computes, checked before compiled code sees it: past this file an index is never questioned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]


class InvalidStepError(ValueError):
    """A step that would read or write where it must not; the message names the array and the value."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What indices may be: below these. slots: of the pool; positions: the rotary table's."""

    vocab: int
    positions: int
    slots: int
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """Rows of one step. Rows of a sequence lie together, their positions ascending by one.

    tokens, positions, slots, sequences: [rows] int32; slot -1 is the base model alone, sequence is a row of
        `block_tables`
    block_tables: [sequences, most blocks] int32, those past a sequence's last position are not looked at
    sampled_rows: [n] int32, the rows whose logits are wanted
    """

    tokens: Int32s
    positions: Int32s
    slots: Int32s
    sequences: Int32s
    block_tables: Int32s
    sampled_rows: Int32s

    def check(self, limits: StepLimits) -> None:
        """Raise InvalidStepError unless every index is in its range and every position has its block."""
        rows = len(self.tokens)
        for name in ("tokens", "positions", "slots", "sequences", "block_tables", "sampled_rows"):
            array, dimensions = getattr(self, name), 2 if name == "block_tables" else 1
            if array.dtype != np.int32 or array.ndim != dimensions or not array.flags.c_contiguous:
                raise InvalidStepError(f"{name} must be contiguous int32 of {dimensions} dimension(s)")
            if name in ("positions", "slots", "sequences") and len(array) != rows:
                raise InvalidStepError(f"{name} has {len(array)} rows where tokens has {rows}")
        if rows == 0:
            raise InvalidStepError("a step has at least one row")
        _in_range("tokens", self.tokens, 0, limits.vocab)
        _in_range("positions", self.positions, 0, limits.positions)
        _in_range("slots", self.slots, -1, limits.slots)
        _in_range("sequences", self.sequences, 0, len(self.block_tables))
        _in_range("sampled_rows", self.sampled_rows, 0, rows)
        self._check_sequences()
        self._check_blocks(limits)

    def _check_sequences(self) -> None:
        same = np.diff(self.sequences) == 0
        if (np.diff(self.sequences) < 0).any():
            raise InvalidStepError("sequences must ascend: rows of a sequence lie together")
        if (np.diff(self.positions)[same] != 1).any():
            raise InvalidStepError("positions of a sequence must ascend by one")
        if (np.diff(self.slots)[same] != 0).any():
            raise InvalidStepError("slots: a sequence has one slot")

    def _check_blocks(self, limits: StepLimits) -> None:
        """Every block up to a sequence's last position is one of the cache's."""
        needed = np.zeros(len(self.block_tables), np.int64)
        needed[self.sequences] = self.positions // limits.block_size + 1  # its last row writes last
        if needed.max() > self.block_tables.shape[1]:
            raise InvalidStepError(f"block_tables has {self.block_tables.shape[1]} blocks of {needed.max()} needed")
        used = np.arange(self.block_tables.shape[1]) < needed[:, None]
        _in_range("block_tables", self.block_tables[used], 0, limits.num_blocks)


def _in_range(name: str, values: Int32s, low: int, end: int) -> None:
    if values.size and not low <= values.min() <= values.max() < end:
        worst = values.min() if values.min() < low else values.max()
        raise InvalidStepError(f"{name} holds {worst}; it must be from {low} to {end - 1}")
