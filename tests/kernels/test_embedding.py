"""The embedding's adapters, on both paths, against the reference on one-hot rows; and the lm_head, a wide linear."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import BASE_ROW, LoraBatch, LoraWeights
from lora_kernels.errors import MixedDtypes, ShapeMismatch
from lora_kernels.torch_path import apply_lora_embedding_torch, apply_lora_torch
from tests.kernels.path_contract import DTYPES, check
from tests.kernels.pool_builder import assert_close, bits, build_pool

VOCABULARY = 1003
RANKS = [[5], [33], [0], [16], [512]]
ROWS = [1, BASE_ROW, 0, 3, 4, 1, 2, *[3] * 17]

Embed = Callable[[Tensor, Tensor, LoraWeights, LoraBatch], None]


@pytest.fixture(params=["torch", "triton"])
def embed(request: pytest.FixtureRequest, interpreted: dict[str, ModuleType]) -> Embed:
    if request.param == "torch":
        return apply_lora_embedding_torch
    found: Embed = interpreted["triton_embed"].apply_lora_embedding_triton
    return found


def tokens_of(rows: int) -> Tensor:
    made = random.Random(2)
    return torch.tensor([made.randrange(VOCABULARY) for _ in range(rows)], dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokens_column_of_a(embed: Embed, dtype: torch.dtype) -> None:
    pool = build_pool(RANKS, VOCABULARY, [70], dtype)
    y, _ = pool.inputs(len(ROWS))
    tokens = tokens_of(len(ROWS))
    tokens[0], tokens[3] = VOCABULARY - 1, 0
    expected = pool.reference(y, F.one_hot(tokens, VOCABULARY), ROWS)
    before = y.clone()
    embed(y, tokens, pool.weights, pool.batch(ROWS))
    assert_close(y, expected)
    for row in (1, 6):
        assert bits(y[row]).equal(bits(before[row]))


def test_another_shards_tokens_add_nothing(embed: Embed) -> None:
    pool = build_pool(RANKS, VOCABULARY, [70])
    y, _ = pool.inputs(3)
    before = y.clone()
    embed(y, torch.tensor([-1, VOCABULARY, -VOCABULARY]), pool.weights, pool.batch([0, 1, 3]))
    assert y.equal(before)
    embed(y[:0], torch.tensor([], dtype=torch.int64), pool.weights, pool.batch([], active=[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lm_head_is_a_wide_linear(triton_path: ModuleType, dtype: torch.dtype) -> None:
    pool = build_pool([[5], [17]], 40, [VOCABULARY], dtype)
    for apply in (apply_lora_torch, triton_path.apply_lora_triton):
        check(apply, pool, [0, BASE_ROW, 1])


def test_bad_tensors_are_refused(interpreted: dict[str, ModuleType]) -> None:
    embed = interpreted["triton_embed"].apply_lora_embedding_triton
    pool = build_pool(RANKS, VOCABULARY, [70])
    y, _ = pool.inputs(2)
    with pytest.raises(MixedDtypes):
        embed(y, torch.tensor([1.0, 2.0]), pool.weights, pool.batch([0, 1]))
    with pytest.raises(ShapeMismatch):
        embed(y, torch.tensor([1]), pool.weights, pool.batch([0, 1]))
    two = build_pool([[5, 5]], 40, [70, 70])
    with pytest.raises(ShapeMismatch):
        embed(y, torch.tensor([1, 2]), two.weights, two.batch([0, 0]))
