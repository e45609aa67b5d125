"""The sampler against transformers' own warpers, and what is drawn against the exact probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.inference.engine.request import Request, SamplingParams, StoppingParams
from services.inference.model.candidates import WINDOW, largest
from services.inference.model.sampler import GreedyRows, Sampler, uniform

DRAWS = 3000
SEEN = [1, 2, 2, 7]
LOGITS = torch.tensor([2.0, 1.5, 1.4, 0.3, -0.5, 0.0, 2.2, -3.0, 0.9, 1.1])


def make_request(output: tuple[int, ...] = (), stopping: StoppingParams | None = None, **sampling: Any) -> Request:
    request = Request("r", list(SEEN), SamplingParams(**sampling), stopping or StoppingParams(1000))
    request.token_ids += output
    return request


def draw(logits: Tensor, **sampling: Any) -> int:
    return Sampler().sample(logits.clone()[None], [make_request(**sampling)])[0].token_id


def probabilities(**sampling: float) -> Tensor:
    """What the same parameters mean in transformers."""
    warpers: list[LogitsProcessor] = []
    if "repetition_penalty" in sampling:
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling["repetition_penalty"]))
    warpers.append(TemperatureLogitsWarper(float(sampling["temperature"])))
    if "top_k" in sampling:
        warpers.append(TopKLogitsWarper(int(sampling["top_k"])))
    if "top_p" in sampling:
        warpers.append(TopPLogitsWarper(sampling["top_p"]))
    if "min_p" in sampling:
        warpers.append(MinPLogitsWarper(sampling["min_p"]))
    scores, ids = LOGITS.clone()[None], torch.tensor([SEEN])
    for warper in warpers:
        scores = warper(ids, scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.7, "min_p": 0.3},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.8},
        {"temperature": 1.0, "repetition_penalty": 1.7},
    ],
    ids=str,
)
def test_draws_follow_the_probabilities(sampling: dict[str, Any]) -> None:
    """Pearson's chi-square over fixed seeds, so the outcome is the same at every run."""
    expected = probabilities(**sampling)
    counts = torch.zeros(len(LOGITS))
    for seed in range(DRAWS):
        counts[draw(LOGITS, seed=seed, **sampling)] += 1
    possible = expected > 0
    assert not counts[~possible].any(), "a token that was filtered out was drawn"
    chi_square = float(((counts - DRAWS * expected) ** 2 / (DRAWS * expected))[possible].sum())
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom), f"{chi_square:.1f} with {freedom} degrees of freedom"


@given(
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(1, 10),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=80, deadline=None)
def test_only_what_transformers_keeps_is_drawn(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    assert probabilities(**sampling)[draw(LOGITS, seed=seed, **sampling)] > 0


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}, {"temperature": 0.0}])
def test_narrowed_to_the_best_it_is_greedy(narrow: dict[str, Any]) -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    for seed, row in enumerate(logits):
        assert draw(row, **({"temperature": 1.0, "seed": seed} | narrow)) == int(row.argmax())


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-20, 1e-6])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.randn(20, 40, generator=torch.Generator().manual_seed(2)) * 30
    for seed, row in enumerate(logits):
        assert draw(row, temperature=temperature, seed=seed) == int(row.argmax())


def test_the_smallest_repetition_penalty_favours_what_was_seen() -> None:
    for seed in range(20):
        assert draw(LOGITS, temperature=1.0, repetition_penalty=1e-44, seed=seed) in SEEN


@pytest.mark.parametrize(
    ("sampling", "changed"),
    [
        ({"frequency_penalty": 0.5}, {3: -1.0, 4: -0.5}),
        ({"presence_penalty": 0.5}, {3: -0.5, 4: -0.5}),
        ({"frequency_penalty": -1.0, "presence_penalty": 2.0}, {3: 0.0, 4: -1.0}),
        ({"logit_bias": {0: -5.0, 9: 5.0}}, {0: -5.0, 9: 5.0}),
    ],
    ids=str,
)
def test_penalties_and_biases_shift_logits(sampling: dict[str, Any], changed: dict[int, float]) -> None:
    """Output tokens 3, 3 and 4. A draw from shifted logits by hand must be the same draw."""
    by_hand = LOGITS.clone()
    for token, shift in changed.items():
        by_hand[token] += shift
    for seed in range(200):
        asked = make_request((3, 3, 4), temperature=1.0, seed=seed, **sampling)
        plain = make_request((3, 3, 4), temperature=1.0, seed=seed)
        ours = Sampler().sample(LOGITS.clone()[None], [asked])
        assert ours == Sampler().sample(by_hand[None].clone(), [plain])


def test_stop_ids_are_impossible_before_min_tokens() -> None:
    stopping = StoppingParams(10, min_tokens=2, stop_token_ids=frozenset({6, 0}))
    tokens = [
        Sampler().sample(LOGITS.clone()[None], [make_request((5,) * count, stopping)])[0].token_id for count in range(3)
    ]
    assert tokens == [1, 1, 6]


def test_when_every_token_would_end_too_soon_any_is_drawn() -> None:
    stopping = StoppingParams(10, min_tokens=2, stop_token_ids=frozenset(range(len(LOGITS))))
    requests = [make_request((), stopping, temperature=1.0, seed=seed) for seed in range(100)]
    drawn = Sampler().sample(LOGITS.expand(100, -1), requests)
    assert {each.token_id for each in drawn} == set(range(len(LOGITS)))


def test_log_probabilities_are_the_models_own() -> None:
    """Before temperature, filters and penalties."""
    asked = make_request(temperature=2.0, top_k=1, repetition_penalty=2.0, logit_bias={5: 100.0}, logprobs=3)
    (sampled,) = Sampler().sample(LOGITS.clone()[None], [asked])
    exact = LOGITS.log_softmax(-1)
    assert sampled.token_id == 5
    assert sampled.logprobs is not None
    assert sampled.logprobs.chosen == pytest.approx(float(exact[5]))
    assert sampled.logprobs.top_ids == (6, 0, 1)
    assert sampled.logprobs.top == pytest.approx([float(exact[token]) for token in (6, 0, 1)])


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 1 << 20))
def test_random_numbers_depend_on_seed_and_position_alone(seed: int, position: int) -> None:
    number = uniform(seed, position)
    assert 0 <= number < 1
    assert number == uniform(seed, position) != uniform(seed, position + 1)
    assert number != uniform(seed ^ 1, position)


def test_a_row_does_not_depend_on_who_is_beside_it() -> None:
    logits = torch.randn(8, 60, generator=torch.Generator().manual_seed(3)) * 2
    requests = [make_request(temperature=1.0, seed=seed, top_p=0.9) for seed in range(8)]
    together = Sampler().sample(logits.clone(), requests)
    for order in ([7, 3, 1], [0], [2, 2, 5]):
        assert Sampler().sample(logits[order].clone(), [requests[row] for row in order]) == [
            together[row] for row in order
        ]


def by_full_sort(logits: Tensor, number: float, sampling: SamplingParams) -> tuple[int, float]:
    """The token that the same number falls on, everything sorted; and how near the number is to another token."""
    order = torch.sort(logits, descending=True, stable=True).indices
    order = order[: sampling.top_k or len(order)]
    weights = torch.softmax((logits[order].double() - logits[order[0]].double()) / sampling.temperature, dim=-1).numpy()
    before = weights.cumsum() - weights
    kept = before < sampling.top_p
    near = float(np.abs(before - sampling.top_p).min()) if sampling.top_p < 1 else 1.0
    floor = sampling.min_p * weights[0]
    near = min(near, float(np.abs(weights / floor - 1).min())) if floor else near
    reached = (weights * (kept & (weights >= floor))).cumsum()
    token = min(int((reached <= number * reached[-1]).sum()), len(order) - 1)
    return int(order[token]), min(near, float(np.abs(reached / reached[-1] - number).min()))


@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([3, WINDOW, WINDOW + 1, 3000, 9000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    temperature=st.sampled_from([1e-45, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 7, 400]),
    top_p=st.sampled_from([1e-9, 0.3, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_few_candidates_give_what_a_full_sort_gives(seed: int, vocab: int, spread: float, **sampling: Any) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread
    if spread and len(set(logits.tolist())) < vocab:
        logits = torch.sort(logits).values + torch.arange(vocab) * 1e-5  # equal values have no order to agree on
    asked = SamplingParams(seed=seed, **sampling)
    expected, near = by_full_sort(logits, uniform(seed, 0), asked)
    if spread and near > 1e-6:  # else the last bits of a sum decide
        assert draw(logits, seed=seed, **sampling) == expected
    else:
        assert 0 <= draw(logits, seed=seed, **sampling) < vocab


@given(
    values=st.lists(st.integers(-3, 40), min_size=1, max_size=400), pick=st.integers(0, 400), repeats=st.integers(1, 9)
)
@settings(max_examples=100, deadline=None)
def test_the_largest_are_the_first_of_a_full_sort(values: list[int], pick: int, repeats: int) -> None:
    row = np.array(values * repeats, dtype=np.float32)
    assert largest(row, pick).tolist() == np.argsort(-row, kind="stable")[:pick].tolist()


def test_greedy_rows_need_no_logits() -> None:
    """Rows that need none hold NaN here; their token and what is wrong with them is the step's to say."""
    logits = torch.stack([torch.full_like(LOGITS, torch.nan), LOGITS, torch.full_like(LOGITS, torch.nan), LOGITS])
    requests = [make_request(), make_request(logprobs=1), make_request(), make_request(logit_bias={4: 50.0})]
    assert [Sampler().needs_logits(each) for each in requests] == [False, True, False, True]
    told = GreedyRows(token_ids=[3, 6, 0, 6], finite=[True, True, False, True])
    first, second, third, fourth = Sampler().sample(logits, requests, told)
    assert (first.token_id, second.token_id, fourth.token_id) == (3, 6, 4)
    assert second.logprobs is not None
    assert third.error is not None


@given(steps=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30))
@settings(max_examples=40, deadline=None)
def test_penalties_count_on_from_step_to_step(steps: list[tuple[int, bool]]) -> None:
    """As they would from the start, whether or not the request was in the step before."""
    shape: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.1}
    request, sampler = make_request(temperature=1.0, seed=5, **shape), Sampler()
    for token, sampled in steps:
        request.token_ids.append(token)
        if sampled:
            assert sampler.sample(LOGITS[None], [request]) == Sampler().sample(LOGITS[None], [request])
        else:
            sampler.sample(LOGITS[None], [make_request()])
