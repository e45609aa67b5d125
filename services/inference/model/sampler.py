"""Logits to tokens, one row a request. Rows never mix: a row's token depends on its own logits and parameters alone.

Random numbers are counter-based (Philox, Salmon et al. 2011): the one for a request's n-th token is a function of its
seed and n, so neither the batch nor a preemption changes what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from services.common.errors import FailedPrecondition, Internal, MultiloraError
from services.inference.engine.interfaces import SampledToken
from services.inference.engine.messages import TokenLogprobs
from services.inference.engine.request import Request
from services.inference.model.candidates import Row, draw, largest
from services.inference.model.penalties import Penalties, changes_logits


@dataclass(frozen=True, slots=True)
class GreedyRows:
    """What a step found out about its sampled rows while it computed them.

    token_ids: the largest logit of each row, of equal ones the first; anything where the row is not finite
    finite: False for a row with an inf or NaN
    """

    token_ids: Sequence[int]
    finite: Sequence[bool]


class Sampler:
    """Chooses the next token of each request; keeps what penalties count of the requests it saw last."""

    def __init__(self) -> None:
        self._penalties = Penalties()

    def needs_logits(self, request: Request) -> bool:
        """Whether `sample` reads the request's row of logits when it is told the row's greedy token."""
        return request.sampling.temperature != 0 or request.sampling.logprobs is not None or changes_logits(request)

    def sample(
        self, logits: Tensor, requests: Sequence[Request], greedy: GreedyRows | None = None
    ) -> list[SampledToken]:
        """A token, or an error, per request.

        Shape: logits [len(requests), vocab] float32 on the CPU, left as they are. With `greedy`, rows whose request
        `needs_logits` says no for are not read and may hold anything.
        """
        rows = logits.numpy()
        known = greedy or GreedyRows(rows.argmax(axis=-1).tolist(), np.isfinite(rows).all(axis=-1).tolist())
        self._penalties.follow(requests)
        return [
            self._sample_row(row, request, token) if finite else SampledToken(error=non_finite(request))
            for row, request, token, finite in zip(rows, requests, known.token_ids, known.finite, strict=True)
        ]

    def _sample_row(self, logits: Row, request: Request, greedy: int) -> SampledToken:
        sampling, choices = request.sampling, logits
        if changes_logits(request):
            choices = self._penalties.apply(logits, request)
            greedy = int(choices.argmax())
        if sampling.temperature == 0:
            token = greedy
        else:
            token = draw(choices, sampling, uniform(sampling.seed, request.num_output_tokens))
        if sampling.logprobs is None:
            return SampledToken(token)
        return SampledToken(token, _logprobs(logits, token, sampling.logprobs))


def non_finite(request: Request) -> MultiloraError:
    """What a request ends with whose logits hold an inf or NaN."""
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


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) for a request's token at `position` of its answer."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position << 64)).random())


def _logprobs(logits: Row, token: int, count: int) -> TokenLogprobs:
    """The model's own, before temperature, filters and penalties."""
    best = logits.max()
    total = float(best) + float(np.log(np.exp(logits - best).sum(dtype=np.float64)))
    ids = largest(logits, count)
    top = tuple(float(value) - total for value in logits[ids])
    return TokenLogprobs(float(logits[token]) - total, tuple(ids.tolist()), top)
