"""On a GPU: fewer launches, the embedding and the pool's copies, compiled, against the default or torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora_kernels.pool_copy import StagedRows, move, move_copies, scatter, scatter_copies
from lora_kernels.torch_path import apply_lora_embedding_torch
from tests.kernels.path_contract import DTYPES, MIXED_RANKS, MIXED_ROWS, QKV
from tests.kernels.pool_builder import assert_close, bits, build_pool
from tests.kernels.test_cuda import batch_on_gpu, pytestmark, weights_on_gpu  # noqa: F401 -- the mark is for this module
from tests.kernels.test_fused import EPS, rms_norm, source_of, weight_of


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_is_the_same_linear(dtype: torch.dtype) -> None:
    from lora_kernels import triton_fused, triton_path

    pool = build_pool(MIXED_RANKS, 1100, QKV, dtype)
    weights, batch, weight = weights_on_gpu(pool.weights), batch_on_gpu(pool.batch(MIXED_ROWS)), weight_of(pool)
    source, gain = source_of(len(MIXED_ROWS), dtype), torch.linspace(-1.0, 2.0, 1100).to(dtype)
    x, shrunk = triton_fused.norm_shrink(source[:, :1100].cuda(), gain.cuda(), EPS, weights, batch)
    assert_close(x.cpu(), rms_norm(source[:, :1100], gain).double())

    apart = F.linear(x, weight.cuda())
    triton_path.apply_lora_triton(apart, x, weights, batch)
    expanded = F.linear(x, weight.cuda())
    triton_path.expand(expanded, shrunk, weights, batch)
    beside = triton_fused.linear_beside_shrink(
        lambda x: F.linear(x, weight.cuda()), x, weights, batch, torch.cuda.Stream()
    )
    assert bits(expanded).equal(bits(apart)) and bits(beside).equal(bits(apart))

    one = triton_fused.linear_expand(x, weight.cuda(), shrunk, weights, batch).cpu()
    base = x.cpu().double() @ weight.double().T
    assert_close(one, pool.reference(base, x.cpu(), MIXED_ROWS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype) -> None:
    from lora_kernels import apply_lora_embedding

    pool = build_pool([[5], [33], [0]], 300, [70], dtype)
    y, _ = pool.inputs(4)
    tokens, batch = torch.tensor([0, 299, 7, -1]), pool.batch([1, 0, 2, 1])
    on_gpu = y.cuda()
    apply_lora_embedding(on_gpu, tokens.cuda(), weights_on_gpu(pool.weights), batch_on_gpu(batch))
    apply_lora_embedding_torch(y, tokens, pool.weights, batch)
    assert_close(on_gpu.cpu(), y.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("staged_dtype", DTYPES)
def test_pool_copies_are_torchs(dtype: torch.dtype, staged_dtype: torch.dtype) -> None:
    staged = torch.randn(40 * 300).to(staged_dtype)
    found = []
    for device in ("cpu", "cuda"):
        pool = torch.ones(7 * 16 * 256, dtype=dtype, device=device)
        into = pool.view(-1, 256)
        scatter(pool, staged.to(device), scatter_copies(pool, into, (5, 0), StagedRows(8, 21, 300, 40)))
        move(pool, move_copies(pool, into, [(5, 1), (0, 6)]))
        found.append(bits(pool.cpu()))
    assert found[0].equal(found[1])
