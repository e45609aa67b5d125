"""Drawing tokens where the logits are: what `candidates.draw` does, for all rows of a step at once.

Only the best `WINDOW` candidates of a row are looked at. A row whose answer may lie beyond them is left to the host,
which is rare: the distribution is nearly flat there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from services.inference.engine.interfaces import SampledToken
from services.inference.engine.request import Request
from services.inference.model.candidates import WINDOW
from services.inference.model.penalties import changes_logits
from services.inference.model.sampler import GreedyRows, Sampler, non_finite, uniform


class DeviceSampler:
    """Greedy tokens and plain draws are chosen on the device. Penalties, biases and logprobs are the host's sampler's,
    which gets the logits of those rows alone."""

    def __init__(self, host: Sampler) -> None:
        self._host = host

    def sample(self, logits: Tensor, greedy: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """A token, or an error, per request. Waits for the device once, and again where the host must choose.

        Shape: logits [n, vocab] float32; greedy [2, n] int64, the largest logit's token, and 1 where all are finite;
        both on one device, and n at least len(requests), whose rows come first
        """
        drawn = [row for row, request in enumerate(requests) if _draws_here(request)]
        chosen = greedy
        if drawn:
            rows = _to_device(torch.tensor(drawn), logits.device)
            parameters = draw_parameters([requests[row] for row in drawn], logits.shape[1], logits.device)
            chosen = torch.cat([greedy, draw_rows(logits.index_select(0, rows), parameters)], dim=1)
        tokens, flags = chosen.tolist()
        draws = dict(zip(drawn, range(greedy.shape[1], len(tokens)), strict=True))
        answers: list[SampledToken] = []
        unanswered = []
        for row, request in enumerate(requests):
            answers.append(SampledToken(tokens[draws.get(row, row)]))
            if not flags[row]:
                answers[row] = SampledToken(error=non_finite(request))
            elif self._host.needs_logits(request) and not (row in draws and flags[draws[row]]):
                unanswered.append(row)
        if unanswered:
            known = GreedyRows([tokens[row] for row in unanswered], [True] * len(unanswered))
            wanted = logits[unanswered].cpu()
            sampled = self._host.sample(wanted, [requests[row] for row in unanswered], known)
            for row, token in zip(unanswered, sampled, strict=True):
                answers[row] = token
        return answers


def _draws_here(request: Request) -> bool:
    sampling = request.sampling
    return sampling.temperature != 0 and sampling.logprobs is None and not changes_logits(request)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that nobody waits for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def draw_parameters(requests: Sequence[Request], vocab: int, device: torch.device) -> Tensor:
    """[5, n] float64: temperature, candidates that top_k leaves, top_p, min_p and the random number of each request."""
    rows = [
        (
            request.sampling.temperature,
            min(request.sampling.top_k or vocab, vocab),
            request.sampling.top_p,
            request.sampling.min_p,
            uniform(request.sampling.seed, request.num_output_tokens),
        )
        for request in requests
    ]
    return _to_device(torch.tensor(rows, dtype=torch.float64), device).T


def draw_rows(logits: Tensor, parameters: Tensor) -> Tensor:
    """[2, n] int64: the token of each row, and 1; or anything and 0, where the host has to look at more candidates.

    Shape: logits [n, vocab] float32, parameters as `draw_parameters` makes them. Waits for nothing.
    """
    temperature, everything, top_p, min_p, number = parameters[:, :, None]
    vocab = logits.shape[1]
    values, ids = _largest(logits, min(WINDOW, vocab))
    width = values.shape[1]
    wide = values.double()
    place = torch.arange(width, device=logits.device)
    weights = torch.where(place < everything, torch.exp((wide - wide[:, :1]) / temperature), 0.0)
    reached = weights.cumsum(1)
    partial = everything > width
    slope = (1 / temperature).clamp(max=1e30).float()
    mass = ((logits - values[:, :1]) * slope).exp().sum(1, keepdim=True, dtype=torch.float64)
    all_mass = torch.where(partial, mass, reached[:, -1:])

    limit = everything.clamp(max=width).long()
    by_top_p = torch.where(top_p < 1, (place < limit) & (reached - weights < top_p * all_mass), place < limit)
    by_min_p = torch.where(min_p > 0, (place < limit) & (weights >= min_p), place < limit)
    kept = torch.minimum(by_top_p.sum(1, keepdim=True), by_min_p.sum(1, keepdim=True)).clamp(min=1)
    beyond = partial & (kept == width)
    last_mass = reached.gather(1, kept - 1)
    target = number * torch.where(beyond, all_mass, last_mass)
    last = (reached < last_mass).sum(1, keepdim=True)  # the last one with any mass
    index = torch.minimum(((place < kept) & (reached <= target)).sum(1, keepdim=True), last)

    found = ~(beyond & ((top_p < 1) | (min_p > 0) | (target >= reached[:, -1:])))
    found &= ~partial | (everything == vocab)
    if width < vocab:  # which of equal values are in the window is not said
        found &= values.gather(1, index) > values[:, -1:]
    return torch.cat([ids.gather(1, index), found.long()], dim=1).T


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and ids of each row's largest, from the largest down, of equal ones the first id first."""
    ids = logits.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
    values, order = logits.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)
