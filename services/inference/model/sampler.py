"""Logits to tokens, one row a request. Rows never mix: a row's token depends on its own logits and parameters alone.

Random numbers are counter-based (Philox, Salmon et al. 2011): the one for a request's n-th token is a function of its
seed and n, so neither the batch nor a preemption changes what is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from services.common.errors import FailedPrecondition, Internal, MultiloraError
from services.inference.engine.interfaces import SampledToken
from services.inference.engine.messages import TokenLogprobs
from services.inference.engine.request import Request, SamplingParams


class Sampler:
    """Chooses the next token of each request."""

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """A token, or an error, per request. Shape: logits [len(requests), vocab] float32; may be changed in place."""
        finite = torch.isfinite(logits).all(dim=-1).tolist()
        greedy = logits.argmax(dim=-1).tolist()
        return [
            self._sample_row(logits[row], request, greedy[row])
            if finite[row]
            else SampledToken(error=_non_finite(request))
            for row, request in enumerate(requests)
        ]

    def _sample_row(self, logits: Tensor, request: Request, greedy: int) -> SampledToken:
        sampling = request.sampling
        logprobs = torch.log_softmax(logits, dim=-1) if sampling.logprobs is not None else None
        if _changes_logits(request):
            logits = _processed(logits, request)
            greedy = int(logits.argmax())
        token = greedy if sampling.temperature == 0 else _draw(logits, sampling, request.num_output_tokens)
        return SampledToken(token, None if logprobs is None else _logprobs(logprobs, token, sampling.logprobs or 0))


def _non_finite(request: Request) -> MultiloraError:
    if request.adapter is None:
        return Internal("NON_FINITE_LOGITS", "the base model produced values that are not finite for this prompt")
    name = f"{request.adapter.name}@{request.adapter.version}"
    return FailedPrecondition(
        "NON_FINITE_LOGITS",
        f"adapter {name} overflows on this prompt: its logits are not finite; register a version with smaller weights",
        field="adapter",
        adapter=name,
        digest=request.adapter.digest,
    )


def _changes_logits(request: Request) -> bool:
    sampling = request.sampling
    return bool(
        sampling.repetition_penalty != 1
        or sampling.frequency_penalty
        or sampling.presence_penalty
        or sampling.logit_bias
        or (request.num_output_tokens < request.stopping.min_tokens and request.stopping.stop_token_ids)
    )


def _processed(logits: Tensor, request: Request) -> Tensor:
    """Penalties, biases, and no end before min_tokens."""
    sampling, logits = request.sampling, logits.clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(request.token_ids)))
        values = logits[seen]
        penalised = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
        logits[seen] = penalised.clamp(max=torch.finfo(logits.dtype).max)  # a tiny penalty must not make it inf
    if sampling.frequency_penalty or sampling.presence_penalty:
        counts = Counter(request.output_token_ids)
        if counts:
            ids, times = torch.tensor(list(counts)), torch.tensor(list(counts.values()))
            logits[ids] -= sampling.frequency_penalty * times + sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    if request.num_output_tokens < request.stopping.min_tokens and request.stopping.stop_token_ids:
        logits[torch.tensor(sorted(request.stopping.stop_token_ids))] = -torch.inf
    return logits


def _draw(logits: Tensor, sampling: SamplingParams, position: int) -> int:
    """Draw from the filtered distribution: top_k first, so that the sort is short, then top_p, then min_p."""
    kept = min(sampling.top_k or logits.numel(), logits.numel())
    values, ids = torch.topk(logits, kept) if kept < logits.numel() else torch.sort(logits, descending=True)
    # the best one subtracted first: else a tiny temperature makes inf of several, and NaN of all
    probabilities = torch.softmax((values.double() - values[0]) / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= sampling.top_p] = 0
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities[0]] = 0
    cumulative = probabilities.cumsum(0)
    drawn = torch.searchsorted(cumulative, uniform(sampling.seed, position) * cumulative[-1], right=True)
    last = int(probabilities.nonzero()[-1])
    return int(ids[min(int(drawn), last)])


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) for a request's token at `position` of its answer."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position << 64)).random())


def _logprobs(logprobs: Tensor, token: int, count: int) -> TokenLogprobs:
    top, ids = torch.topk(logprobs, count)
    return TokenLogprobs(float(logprobs[token]), tuple(ids.tolist()), tuple(top.tolist()))
