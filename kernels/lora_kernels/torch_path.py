"""The torch path: what a CPU runs, and what stays when no kernel can.

All active adapters' rank rows are laid side by side, so a batch costs one product down to the rank and one back up,
whatever it mixes. A row of the batch keeps only its own adapter's ranks, by *selection*: another adapter's shrink
result may have overflowed to inf, and inf times a zero mask would be NaN in a neighbour's answer.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lora_kernels.layout import ActiveSet, GatheredWeights, LoraBatch, LoraWeights


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
    shrunk = x.float() @ gathered.a.T
    shrunk *= gathered.scales
    shrunk = torch.where(batch.row_slots[:, None] == ranks.owners, shrunk, 0.0)
    column = 0
    for index, b in enumerate(gathered.b):
        out = y[:, column : column + b.shape[1]]
        column += b.shape[1]
        start, end = ranks.bounds[index : index + 2]
        if start == end:
            continue
        own = shrunk[:, start:end]
        if not gathered.finite:
            out.add_(_expand_apart(own, b, ranks.owners[start:end], batch.row_slots))
        elif y.dtype is torch.float32:
            out.addmm_(own, b)
        else:
            out.add_(own @ b)


def _expand_apart(shrunk: Tensor, b: Tensor, owners: Tensor, row_slots: Tensor) -> Tensor:
    """One product an adapter: the zeros that keep neighbours apart above cannot stand before an inf or NaN in B."""
    product = shrunk.new_zeros(shrunk.shape[0], b.shape[1])
    for slot in set(owners.tolist()):
        rows, ranks = row_slots == slot, owners == slot
        product[rows] = shrunk[rows][:, ranks] @ b[ranks]
    return product


def _gather(weights: LoraWeights, active: ActiveSet) -> GatheredWeights:
    """The active rank rows of one layer's group, copied out of the pool once per active set."""
    if (known := active.gathered.get(weights)) is not None:
        return known
    ranks = active.rank_rows(weights.group)
    slices, rows_per_slice, width = weights.a.shape
    owners = ranks.owners.long()
    scales = torch.cat(
        [weights.scales[index, owners[start:end]] for index, (start, end) in enumerate(_spans(ranks.bounds))]
    )
    b = tuple(
        weights.b[index].index_select(0, ranks.rows[start:end] - index * rows_per_slice).float()
        for index, (start, end) in enumerate(_spans(ranks.bounds))
    )
    gathered = GatheredWeights(
        a=weights.a.view(slices * rows_per_slice, width).index_select(0, ranks.rows).float(),
        b=b,
        scales=scales,
        finite=all(bool(rows.isfinite().all()) for rows in b),
    )
    active.gathered[weights] = gathered
    return gathered


def _spans(bounds: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(pairwise(bounds))
