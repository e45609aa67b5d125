"""Drawing tokens where the logits are: what `candidates.draw` does, for all rows of a step at once.

Only the best `WINDOW` candidates of a row are looked at. A row whose answer may lie beyond them is left to the host,
which is rare: the distribution is nearly flat there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.inference.engine.interfaces import SampledToken
from services.inference.engine.request import Request, SamplingParams
from services.inference.model.candidates import WINDOW, draw
from services.inference.model.penalties import changes_logits
from services.inference.model.read_back import ReadBack
from services.inference.model.sampler import GreedyRows, Sampler, non_finite, uniform


@dataclass(frozen=True, eq=False, slots=True)
class Choices:
    """What the device chooses for the sampled rows of a step.

    tokens: [n] int64, each row's token, on the device
    answers: waits for the device; [3, n] int64 on the host: the tokens, 1 where the logits are finite, and 1 where the
        token is found, 0 where more candidates have to be looked at
    drawn: the rows that were drawn, with their logits [drawn, vocab] on the device and their random numbers
    fetch: brings logits to the host once `answers` are there
    """

    requests: Sequence[Request]
    tokens: Tensor
    answers: Callable[[], Tensor]
    drawn: Sequence[int]
    logits: Tensor
    numbers: Sequence[float]
    fetch: Callable[[Tensor], Tensor]

    def read(self) -> list[SampledToken]:
        """A token, or an error, per request. Waits for the step, and for none after it."""
        tokens, finite, found = self.answers().tolist()
        read = [
            SampledToken(token) if ok else SampledToken(error=non_finite(request))
            for token, ok, request in zip(tokens, finite, self.requests, strict=True)
        ]
        for index, row in enumerate(self.drawn):
            if finite[row] and not found[row]:
                logits = self.fetch(self.logits[index]).numpy()
                token = draw(logits, self.requests[row].sampling, self.numbers[index])
                read[row] = SampledToken(token, late=True)
        return read


class DeviceSampler:
    """Greedy tokens and plain draws are chosen on the device, where the next step goes on from them. Penalties, biases
    and logprobs are the host's sampler's, which gets the logits of those rows alone."""

    def __init__(self, host: Sampler, device: torch.device) -> None:
        self._host = host
        self._read_back = ReadBack(device)

    def choose(self, logits: Tensor, greedy: Tensor, requests: Sequence[Request]) -> Choices:
        """A token per request, without waiting for the device; those that are left to the host are not meant.

        Shape: logits [n, vocab] float32; greedy [2, n] int64, the largest logit's token, and 1 where all are finite;
        both on one device, and n at least len(requests), whose rows come first
        """
        drawn = [row for row, request in enumerate(requests) if _draws_here(request)]
        numbers = [uniform(requests[row].sampling.seed, requests[row].num_output_tokens) for row in drawn]
        greedy = greedy[:, : len(requests)]
        answers = torch.cat([greedy, torch.ones_like(greedy[:1])])
        of_drawn = logits.new_empty(0)
        if drawn:
            rows = _to_device(torch.tensor(drawn), logits.device)
            of_drawn = logits.index_select(0, rows)
            sampling = [requests[row].sampling for row in drawn]
            parameters = draw_parameters(sampling, numbers, logits.shape[1], logits.device)
            answers[::2].index_copy_(1, rows, draw_rows(of_drawn, parameters))
        answered, fetch = self._read_back.start(answers), self._read_back.fetch
        return Choices(requests, answers[0], answered, drawn, of_drawn, numbers, fetch)

    def leaves_to_host(self, request: Request) -> bool:
        """Whether the host has to choose the request's next token."""
        return self._host.needs_logits(request) and not _draws_here(request)

    def read(self, logits: Tensor, choices: Choices) -> list[SampledToken]:
        """What `choices.read` says, and the host's choice where it is left to it, from the logits chosen from."""
        read, requests = choices.read(), choices.requests
        left = [row for row, token in enumerate(read) if token.error is None and self.leaves_to_host(requests[row])]
        if left:
            known = GreedyRows([read[row].token_id for row in left], [True] * len(left))
            sampled = self._host.sample(logits[left].cpu(), [requests[row] for row in left], known)
            for row, token in zip(left, sampled, strict=True):
                read[row] = token
        return read


def _draws_here(request: Request) -> bool:
    sampling = request.sampling
    return sampling.temperature != 0 and sampling.logprobs is None and not changes_logits(request)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that nobody waits for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def draw_parameters(
    samplings: Sequence[SamplingParams], numbers: Sequence[float], vocab: int, device: torch.device
) -> Tensor:
    """[5, n] float64: temperature, candidates that top_k leaves, top_p, min_p and the random number of each row."""
    rows = [
        (sampling.temperature, min(sampling.top_k or vocab, vocab), sampling.top_p, sampling.min_p, number)
        for sampling, number in zip(samplings, numbers, strict=True)
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
