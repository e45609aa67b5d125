"""What a load asks for, and what is made of the answers: pure functions, checked against their definitions."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.bench.load.answer import Answer
from services.bench.load.plan import FIRST_ID, Load, arrivals, plan
from services.bench.load.popularity import Mix, Popularity
from services.bench.load.run import sweep
from services.bench.load.summary import METRICS, Wanted, distinct_in_flight, summarise, values_of
from services.bench.quantile import quantile
from services.common.errors import InvalidArgument

popularities = st.builds(
    Popularity,
    mix=st.sampled_from(Mix),
    zipf_s=st.floats(0, 4),
    power_alpha=st.floats(0.05, 4),
    skew_share=st.floats(0, 1),
)


@given(popularities, st.integers(1, 50))
def test_shares_sum_to_one_and_never_rise_but_for_power_above_one(popularity: Popularity, adapters: int) -> None:
    shares = popularity.shares(adapters)
    assert len(shares) == adapters
    assert math.fsum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    if popularity.mix in (Mix.UNIFORM, Mix.IDENTICAL, Mix.ZIPF):
        assert shares == sorted(shares, reverse=True)


@given(popularities, st.integers(1, 20), st.integers(1, 200), st.integers(0, 2**32))
def test_draws_are_adapters_that_have_a_share(popularity: Popularity, adapters: int, requests: int, seed: int) -> None:
    drawn = popularity.draw(adapters, requests, random.Random(seed))
    shares = popularity.shares(adapters)
    assert len(drawn) == requests
    assert all(0 <= number < adapters and shares[number] > 0 for number in drawn)
    if popularity.mix is Mix.DISTINCT:
        assert len(set(drawn[:adapters])) == min(adapters, requests)


@pytest.mark.parametrize(
    ("popularity", "first"),
    [
        (Popularity(mix=Mix.UNIFORM), 0.1),
        (Popularity(mix=Mix.ZIPF, zipf_s=1.0), 1 / sum(1 / rank for rank in range(1, 11))),
        (Popularity(mix=Mix.POWER, power_alpha=0.5), 0.1**0.5),
        (Popularity(mix=Mix.SKEWED, skew_share=0.9), 0.9),
        (Popularity(mix=Mix.IDENTICAL), 1.0),
    ],
)
def test_the_first_adapter_gets_its_share(popularity: Popularity, first: float) -> None:
    counts = Counter(popularity.draw(10, 20_000, random.Random(0)))
    assert counts[0] / 20_000 == pytest.approx(first, abs=0.02)


@given(st.integers(1, 100), st.floats(0.01, 1000), st.floats(0.05, 20), st.integers(0, 2**32))
def test_arrivals_never_go_back(requests: int, rate: float, burstiness: float, seed: int) -> None:
    due = arrivals(requests, rate, burstiness, random.Random(seed))
    assert len(due) == requests
    assert due[0] == 0
    assert due == sorted(due)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_cv(burstiness: float) -> None:
    due = arrivals(20_001, 5.0, burstiness, random.Random(1))
    gaps = [after - before for before, after in itertools.pairwise(due)]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 5, rel=0.05)
    assert statistics.stdev(gaps) / mean == pytest.approx(burstiness**-0.5, rel=0.05)


@given(
    st.integers(0, 2**32),
    st.integers(1, 30),
    st.integers(1, 60),
    st.integers(1, 60),
    st.floats(0, 0.99),
    st.sampled_from((math.inf, 0.5, 20.0)),
)
def test_a_plan_keeps_its_bounds_and_repeats(
    seed: int, count: int, inputs: int, outputs: int, ratio: float, rate: float
) -> None:
    load = Load(
        num_prompts=count,
        request_rate=rate,
        random_input_len=inputs,
        random_output_len=outputs,
        random_range_ratio=ratio,
        vocab_size=FIRST_ID + 5,
        seed=seed,
    )
    requests = plan(load, ["a", "b", "c"])
    assert requests == plan(load, ["a", "b", "c"])
    assert len(requests) == count
    for request in requests:
        assert max(1, math.floor(inputs * (1 - ratio))) <= len(request.prompt) <= math.ceil(inputs * (1 + ratio))
        assert max(1, math.floor(outputs * (1 - ratio))) <= request.max_tokens <= math.ceil(outputs * (1 + ratio))
        assert all(FIRST_ID <= token < FIRST_ID + 5 for token in request.prompt)


def test_another_rate_asks_the_same_questions_of_the_same_adapters() -> None:
    slow, fast = (plan(Load(request_rate=rate, random_range_ratio=0.5), ["a", "b"]) for rate in (1.0, math.inf))
    asked = [[(each.adapter, each.prompt, each.max_tokens) for each in requests] for requests in (slow, fast)]
    assert asked[0] == asked[1]
    assert {each.due for each in fast} == {0.0}


def test_without_adapters_the_base_is_asked() -> None:
    assert {request.adapter for request in plan(Load(num_prompts=3), [])} == {""}


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"num_prompts": 0}, "--num-prompts"),
        ({"request_rate": 0.0}, "--request-rate"),
        ({"burstiness": 0.0}, "--burstiness"),
        ({"max_concurrency": 0}, "--max-concurrency"),
        ({"random_input_len": 0}, "--random-input-len"),
        ({"random_range_ratio": 1.0}, "--random-range-ratio"),
        ({"vocab_size": FIRST_ID}, "--vocab-size"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_flag(settings: dict[str, float], flag: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Load(**settings)  # type: ignore[arg-type]
    assert caught.value.field == flag
    assert flag in caught.value.message


def test_a_mix_is_refused_by_flag() -> None:
    with pytest.raises(InvalidArgument, match=r"--skew-share is 1\.5"):
        Popularity(skew_share=1.5)
    with pytest.raises(InvalidArgument, match="'speed' is none of ttft"):
        Wanted(metrics=("speed",))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 1).map(lambda share: round(share, 4)))
def test_a_quantile_is_the_least_value_that_covers_its_share(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found in values
    below = sum(value < found for value in values)
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    assert below <= share * len(values) + 1e-6


def answer(adapter: str, sent: float, *pieces: float, error: str = "") -> Answer:
    ended = pieces[-1] if pieces else sent
    return Answer(adapter, sent, ended, list(pieces), num_input=4, num_output=len(pieces), error=error)


def test_a_summary_by_hand() -> None:
    answers = [
        answer("a", 0.0, 1.0, 2.0, 4.0),
        answer("b", 1.0, 1.5),
        answer("a", 2.0, error="NOT_FOUND"),
    ]
    found = summarise(answers, Wanted(percentiles=(99,)))
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, {"NOT_FOUND": 1})
    assert found["output_throughput"] == pytest.approx(4 / 4.0)
    assert found["median_ttft_ms"] == pytest.approx(500)
    assert found["p99_ttft_ms"] == pytest.approx(1000)
    assert found["mean_tpot_ms"] == pytest.approx(1500)
    assert values_of(answers, "itl") == pytest.approx([1.0, 2.0])
    assert values_of(answers, "e2el") == pytest.approx([4.0, 0.5])
    assert found["adapters_in_flight"] == pytest.approx((1 * 4 + 0.5) / 4)


def test_a_summary_of_failures_alone() -> None:
    found = summarise([answer("a", 0.0, error="UNAVAILABLE")])
    assert found["failed"] == 1
    assert not [name for name in found if name.endswith("_ms")]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.integers(0, 20)), max_size=20))
def test_distinct_in_flight_against_counting(spans: list[tuple[str, int, int]]) -> None:
    answers = [answer(adapter, float(sent), float(sent + length)) for adapter, sent, length in spans if length]
    if not answers:
        assert distinct_in_flight(answers) == 0
        return
    first, last = int(min(a.sent for a in answers)), int(max(a.ended for a in answers))
    counts = [len({a.adapter for a in answers if a.sent <= moment < a.ended}) for moment in range(first, last)]
    assert distinct_in_flight(answers) == pytest.approx(statistics.fmean(counts))


def test_a_sweep_is_every_combination() -> None:
    points = list(sweep(Load(), [1.0, 2.0], [4], [Mix.ZIPF, Mix.UNIFORM], [1, 2, 3]))
    assert len(points) == 12
    assert {(load.request_rate, load.popularity.mix, count) for load, count in points} == {
        (rate, mix, count) for rate in (1.0, 2.0) for mix in (Mix.ZIPF, Mix.UNIFORM) for count in (1, 2, 3)
    }
    assert METRICS == ("ttft", "tpot", "itl", "e2el")
