"""The ways to multiply by a base weight give one answer."""

from __future__ import annotations

import pytest
import torch

from services.inference.model.linear import _CHUNK_ELEMENTS, WIDEN_FROM_ROWS, Linear, Widener


@pytest.mark.parametrize(("out", "width"), [(5, 3), (48, 32), (_CHUNK_ELEMENTS // 1000 * 2 + 7, 1000)])
@pytest.mark.parametrize("rows", [1, WIDEN_FROM_ROWS - 1, WIDEN_FROM_ROWS, 20])
def test_a_widened_product_is_the_exact_one_rounded(rows: int, out: int, width: int) -> None:
    made = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(size, width, generator=made).bfloat16() for size in (rows, out))
    exact = x.double() @ weight.double().T
    widener = Widener()
    for linear in (Linear(weight, widener), Linear(weight, None), Linear(weight, widener)):
        torch.testing.assert_close(linear(x).double(), exact, rtol=2**-7, atol=1e-3)
