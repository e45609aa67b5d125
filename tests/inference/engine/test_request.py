"""The one function that moves a request: what is drawn is allowed, everything else raises."""

from __future__ import annotations

import itertools

import pytest

from services.inference.engine.request import Request, RequestStatus, SamplingParams, StoppingParams

S = RequestStatus
DRAWN = {
    (S.WAITING_FOR_ADAPTER, S.WAITING),
    (S.WAITING, S.RUNNING),
    (S.RUNNING, S.PREEMPTED),
    (S.PREEMPTED, S.RUNNING),
    (S.RUNNING, S.PARKED),
    (S.PARKED, S.RUNNING),
    (S.PARKED, S.PREEMPTED),
    *itertools.product((S.RUNNING, S.PARKED, S.PREEMPTED), (S.FINISHED_STOPPED, S.FINISHED_LENGTH)),
    *itertools.product(
        (S.WAITING_FOR_ADAPTER, S.WAITING, S.RUNNING, S.PARKED, S.PREEMPTED), (S.FINISHED_CANCELLED, S.FINISHED_ERROR)
    ),
}


def make(status: RequestStatus) -> Request:
    request = Request("r", [1, 2], SamplingParams(), StoppingParams(4))
    request.status = status
    return request


@pytest.mark.parametrize(("before", "after"), list(itertools.product(S, S)), ids=lambda status: status.name)
def test_only_what_is_drawn_is_allowed(before: RequestStatus, after: RequestStatus) -> None:
    request = make(before)
    if (before, after) in DRAWN:
        request.set_status(after)
        assert request.status is after
    else:
        with pytest.raises(AssertionError, match="not allowed"):
            request.set_status(after)
        assert request.status is before


def test_what_is_above_preempted_has_ended() -> None:
    ended = {S.FINISHED_STOPPED, S.FINISHED_LENGTH, S.FINISHED_CANCELLED, S.FINISHED_ERROR}
    assert {status for status in S if status.finished} == ended
    assert not {before for before, _ in DRAWN} & ended


def test_a_requests_tokens_are_its_own() -> None:
    prompt = [1, 2, 3]
    request = Request("r", prompt, SamplingParams(), StoppingParams(4))
    request.token_ids.append(9)
    assert prompt == [1, 2, 3]
    assert (request.num_output_tokens, request.output_token_ids, request.num_uncomputed_tokens) == (1, [9], 4)
