"""The torch path: what a CPU runs, and what stays when no kernel can.

All active adapters' rank rows are laid side by side, so a batch costs one product down to the rank and one back up,
whatever it mixes. A row of the batch keeps only its own adapter's ranks, by *selection*: another adapter's shrink
result may have overflowed to inf, and inf times a zero mask would be NaN in a neighbour's answer.

That multiplies every row by every adapter. Where an adapter's rows are many, a prompt's, each run of rows is
multiplied by its own adapter alone instead.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lora_kernels.layout import ActiveSet, GatheredWeights, LoraBatch, LoraWeights, RankRows

SEGMENT_ROWS = 8
"""Rows a run has on average from which runs are multiplied apart.

Measured on an AVX2 core, float32, SmolLM2-135M's linears, rank 16, CPU milliseconds a layer, together / apart: 8
adapters with 1, 4, 8 and 64 rows each 2.6 / 2.8, 5.2 / 3.9, 6.5 / 3.2 and 23 / 11; 2 adapters with 4, 8 and 64
rows each 0.56 / 0.70, 0.55 / 0.43 and 4.4 / 3.9.
"""


def apply_lora_torch(y: Tensor, x: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """Add each row's adapter to `y` in place.

    Semantics:
        for row i with slot s >= 0, for each slice t:
            y[i, slice t] += (scale[t, s] * x[i] @ A[t, s].T) @ B[t, s]      accumulated in float32
    Shape:
        y: [rows, sum of out]   x: [rows, in]
    """
    gathered = _gather(weights, batch.active)
    ranks = batch.active.rank_rows(weights.group)
    if not ranks.rows.numel():
        return
    if batch.sum_shrunk is not None:
        _apply_summed(y, x, gathered, batch, ranks)
        return
    # zeros that keep neighbours apart cannot stand before an inf or NaN in B
    if not gathered.finite or _runs_are_long(batch):
        _apply_apart(y, x, gathered, batch, ranks)
    else:
        _apply_together(y, x, gathered, batch.foreign(weights.group), ranks)


def apply_lora_embedding_torch(y: Tensor, token_ids: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """Add each row's adapter of the embedding to `y` in place: see `lora_kernels.dispatch.apply_lora_embedding`."""
    gathered, ranks = _gather(weights, batch.active), batch.active.rank_rows(weights.group)
    vocabulary = gathered.a.shape[1]
    known = (token_ids >= 0) & (token_ids < vocabulary)
    shrunk = gathered.a[:, token_ids.clamp(0, vocabulary - 1)].T.masked_fill(~known[:, None], 0.0)
    _expand_apart(y, gathered, batch, ranks, lambda rows, columns: shrunk[rows, columns])


def _runs_are_long(batch: LoraBatch) -> bool:
    return len(batch.active.slots) > 1 and len(batch.row_slots) >= SEGMENT_ROWS * max(1, len(batch.segments))


def _apply_together(y: Tensor, x: Tensor, gathered: GatheredWeights, foreign: Tensor, ranks: RankRows) -> None:
    shrunk = (x.float() @ gathered.a.T).masked_fill_(foreign, 0.0)
    column = 0
    for b, (start, end) in zip(gathered.b, pairwise(ranks.bounds), strict=True):
        out = y[:, column : column + b.shape[1]]
        column += b.shape[1]
        if start < end:
            _add_product(out, shrunk[:, start:end], b)


def _apply_apart(y: Tensor, x: Tensor, gathered: GatheredWeights, batch: LoraBatch, ranks: RankRows) -> None:
    wide = x.float()
    _expand_apart(y, gathered, batch, ranks, lambda rows, columns: wide[rows] @ gathered.a[columns].T)


def _apply_summed(y: Tensor, x: Tensor, gathered: GatheredWeights, batch: LoraBatch, ranks: RankRows) -> None:
    """One sum over the processes for all rows and adapters, whatever B holds in any of them; then each run apart."""
    assert batch.sum_shrunk is not None
    shrunk = x.float() @ gathered.a.T
    batch.sum_shrunk(shrunk)
    _expand_apart(y, gathered, batch, ranks, lambda rows, columns: shrunk[rows, columns])


def _expand_apart(
    y: Tensor,
    gathered: GatheredWeights,
    batch: LoraBatch,
    ranks: RankRows,
    shrunk: Callable[[slice, slice], Tensor],
) -> None:
    """Each run of rows by itself, with its own adapter alone.   shrunk: of a run's rows and a slice's rank rows"""
    for slot, first, end in batch.segments:
        column = 0
        for b, start, spans in zip(gathered.b, ranks.bounds[:-1], ranks.spans, strict=True):
            out = y[first:end, column : column + b.shape[1]]
            column += b.shape[1]
            if slot in spans:
                low, high = spans[slot]
                _add_product(out, shrunk(slice(first, end), slice(start + low, start + high)), b[low:high])


def _add_product(out: Tensor, shrunk: Tensor, b: Tensor) -> None:
    if out.dtype is torch.float32:
        out.addmm_(shrunk, b)
    else:
        out.add_(shrunk @ b)


def _gather(weights: LoraWeights, active: ActiveSet) -> GatheredWeights:
    """The active rank rows of one layer's group, copied out of the pool once per active set."""
    if (known := active.gathered.get(weights)) is not None:
        return known
    ranks = active.rank_rows(weights.group)
    slices, rows_per_slice, width = weights.a.shape
    owners = ranks.owners.long()
    scales = torch.cat(
        [weights.scales[index, owners[start:end]] for index, (start, end) in enumerate(pairwise(ranks.bounds))]
    )
    b = tuple(
        weights.b[index].index_select(0, ranks.rows[start:end] - index * rows_per_slice).float()
        for index, (start, end) in enumerate(pairwise(ranks.bounds))
    )
    gathered = GatheredWeights(
        a=weights.a.view(slices * rows_per_slice, width).index_select(0, ranks.rows).float() * scales[:, None],
        b=b,
        finite=all(bool(rows.isfinite().all()) for rows in b),
    )
    active.gathered[weights] = gathered
    return gathered
