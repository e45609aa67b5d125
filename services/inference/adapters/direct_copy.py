"""Fills pages of a pool in host memory: a linear's rows with one call for all layers, where they lie evenly apart."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_kernels import PAGE_ROWS


def fill(pool: Tensor, page: int, rows: Sequence[Tensor | None], number: int) -> None:
    """Copy the rows of an adapter's page `number` to a page of the pool [layers, rows, width]; what they leave of it is
    zeroed."""
    to = pool[:, page * PAGE_ROWS : (page + 1) * PAGE_ROWS]
    if (together := _together(rows)) is not None:
        _fill_page(to, together, number)
    else:
        for layer, part in enumerate(rows):
            _fill_page(to[layer], to[layer, :0] if part is None else part, number)


def _fill_page(page: Tensor, rows: Tensor, number: int) -> None:
    here = max(0, min(PAGE_ROWS, rows.shape[-2] - number * PAGE_ROWS))
    if here:
        page[..., :here, :].copy_(rows.narrow(-2, number * PAGE_ROWS, here))
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
