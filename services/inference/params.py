"""Ranges of what callers may ask for. One place, whichever face the request came through."""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.common.errors import InvalidArgument
from services.inference.engine.request import SamplingParams, StoppingParams

MAX_LOGPROBS = 20
MAX_STOP_TEXTS = 16
MAX_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Stopping:
    """When an answer ends. max_tokens: None is what is left of the model's length."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False


def check_sampling(sampling: SamplingParams, vocab_size: int) -> SamplingParams:
    """Return `sampling` when every value is in range; else raise InvalidArgument naming the field and the range."""
    _within("sampling.temperature", sampling.temperature, 0, 100)
    _within("sampling.top_p", sampling.top_p, 0, 1, open_below=True)
    _within("sampling.top_k", sampling.top_k, 0, math.inf)
    _within("sampling.min_p", sampling.min_p, 0, 1)
    _within("sampling.repetition_penalty", sampling.repetition_penalty, 0, 10, open_below=True)
    _within("sampling.frequency_penalty", sampling.frequency_penalty, -2, 2)
    _within("sampling.presence_penalty", sampling.presence_penalty, -2, 2)
    _within("sampling.seed", sampling.seed, 0, 2**64 - 1)
    for token, bias in sampling.logit_bias.items():
        _token("sampling.logit_bias", token, vocab_size)
        _within(f"sampling.logit_bias[{token}]", bias, -100, 100)
    if sampling.logprobs is not None:
        _within("output.logprobs", sampling.logprobs, 0, MAX_LOGPROBS)
    return sampling


def check_stopping(stopping: Stopping, room: int, eos: frozenset[int], vocab_size: int) -> StoppingParams:
    """What the engine needs of `stopping`; `room` is what prompt and model length leave, `eos` ends an answer too."""
    if stopping.max_tokens is not None:
        _within("stopping.max_tokens", stopping.max_tokens, 1, math.inf)
    max_tokens = room if stopping.max_tokens is None else min(stopping.max_tokens, room)
    _within("stopping.min_tokens", stopping.min_tokens, 0, max_tokens)
    if len(stopping.stop) > MAX_STOP_TEXTS or not all(stopping.stop):
        raise InvalidArgument(
            "INVALID_STOP", f"stopping.stop holds at most {MAX_STOP_TEXTS} texts, none empty", field="stopping.stop"
        )
    for token in stopping.stop_token_ids:
        _token("stopping.stop_token_ids", token, vocab_size)
    return StoppingParams(max_tokens, stopping.min_tokens, eos | frozenset(stopping.stop_token_ids))


def check_priority(priority: int) -> int:
    """Return `priority` when it is in range; else raise InvalidArgument."""
    _within("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
    return priority


def _within(field: str, value: float, low: float, high: float, *, open_below: bool = False) -> None:
    if math.isfinite(value) and (low < value if open_below else low <= value) and value <= high:
        return
    bracket = "(" if open_below else "["
    above = f"{bracket}{low}, {high}]" if high < math.inf else f"at least {low}"
    raise InvalidArgument(
        "INVALID_PARAMETER",
        f"{field} is {value}; it must be {above if high == math.inf else 'in ' + above}",
        field=field,
    )


def _token(field: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise InvalidArgument(
            "TOKEN_OUT_OF_RANGE", f"{field}: token id {token} is outside the vocabulary of {vocab_size}", field=field
        )
