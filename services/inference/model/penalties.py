"""What changes a request's logits before its token is chosen: penalties, biases, and no end before min_tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from services.inference.engine.request import Request
from services.inference.model.candidates import Row


def changes_logits(request: Request) -> bool:
    """Whether `Penalties.apply` would change anything for the request's next token."""
    sampling = request.sampling
    return bool(_counts_tokens(request) or sampling.logit_bias or _must_go_on(request))


class Penalties:
    """Counts the tokens of the requests that are penalised for them, each token once however long the answer gets."""

    def __init__(self) -> None:
        self._histories: dict[Request, _History] = {}

    def follow(self, requests: Sequence[Request]) -> None:
        """Take in the tokens these requests got since the last call; requests that are not here are forgotten."""
        known = self._histories
        self._histories = {each: known.get(each) or _History() for each in requests if _counts_tokens(each)}
        for request, history in self._histories.items():
            history.take_in(request)

    def apply(self, logits: Row, request: Request) -> Row:
        """Changed logits, a copy. The request is one of those followed."""
        sampling, logits = request.sampling, logits.copy()
        history = self._histories.get(request)
        if history is not None and sampling.repetition_penalty != 1:
            seen = np.fromiter(history.seen, dtype=np.int64, count=len(history.seen))
            values, penalty = logits[seen].astype(np.float64), sampling.repetition_penalty
            penalised = np.where(values > 0, values / penalty, values * penalty)
            logits[seen] = penalised.clip(_LOWEST, _HIGHEST)  # a tiny penalty must not make it inf
        if history is not None and history.said:
            ids = np.fromiter(history.said.keys(), dtype=np.int64, count=len(history.said))
            times = np.fromiter(history.said.values(), dtype=np.float32, count=len(history.said))
            logits[ids] -= np.float32(sampling.frequency_penalty) * times + np.float32(sampling.presence_penalty)
        for token, bias in sampling.logit_bias.items():
            logits[token] += np.float32(bias)
        if _must_go_on(request):
            ends = sorted(request.stopping.stop_token_ids)
            logits[ends] = -np.inf if len(ends) < logits.size else 0.0  # all are forbidden: then all are alike
        return logits


class _History:
    """seen: tokens of prompt and answer; said: how often each token is in the answer."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.said: Counter[int] = Counter()
        self._taken_in = 0

    def take_in(self, request: Request) -> None:
        new = request.token_ids[self._taken_in :]
        self.seen.update(new)
        self.said.update(new[max(0, len(request.prompt_token_ids) - self._taken_in) :])
        self._taken_in = len(request.token_ids)


_HIGHEST = float(np.finfo(np.float32).max)
_LOWEST = float(np.finfo(np.float32).min)


def _counts_tokens(request: Request) -> bool:
    sampling = request.sampling
    return bool(sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty)


def _must_go_on(request: Request) -> bool:
    return request.num_output_tokens < request.stopping.min_tokens and bool(request.stopping.stop_token_ids)
