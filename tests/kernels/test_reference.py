"""The reference against the other way to say LoRA: merged into the weight."""

from __future__ import annotations

import torch

from lora_kernels.reference import LoraSlice, apply_lora_reference


def test_reference_is_the_merged_weight() -> None:
    made = torch.Generator().manual_seed(0)
    a, b, base = (torch.randn(shape, generator=made) for shape in ((3, 7), (3, 5), (5, 7)))
    x = torch.randn(2, 7, generator=made)
    y = (x.double() @ base.double().T).float()
    merged = base.double() + 0.5 * b.double().T @ a.double()
    found = apply_lora_reference(y, x, [0, -1], {0: [LoraSlice(a, b, 0.5)]}, [5])
    torch.testing.assert_close(found[0], x[0].double() @ merged.T, rtol=1e-6, atol=1e-6)
    assert found[1].equal(y[1].double())
