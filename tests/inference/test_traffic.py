"""Traffic by adapter: nothing is lost between the shown ones and the rest, and neither ever falls."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.inference.engine.messages import RequestTimes
from services.inference.traffic import Histogram, Meter, Record, Traffic


@given(names=st.lists(st.sampled_from("abcdefg"), max_size=60), top=st.integers(1, 4))
def test_the_busiest_are_shown_and_the_rest_is_kept(names: list[str], top: int) -> None:
    traffic = Traffic(top)
    rest, shown = 0, dict[str, int]()
    for count, name in enumerate(names, start=1):
        traffic.add(name, Record(generation_tokens=1))
        assert len(traffic.shown) <= top
        assert traffic.rest.generation_tokens >= rest
        assert all(traffic.shown[each].generation_tokens >= had for each, had in shown.items() if each in traffic.shown)
        rest, shown = traffic.rest.generation_tokens, {n: r.generation_tokens for n, r in traffic.shown.items()}
        assert rest + sum(shown.values()) == count
    busiest = max((names.count(name) for name in names), default=0)
    assert not names or busiest == max(names.count(name) for name in traffic.shown)


def test_a_name_that_overtakes_starts_from_nothing() -> None:
    traffic = Traffic(1)
    for name in "abb":
        traffic.add(name, Record(prompt_tokens=10))
    assert {name: record.prompt_tokens for name, record in traffic.shown.items()} == {"b": 10}
    assert traffic.rest.prompt_tokens == 20


def test_buckets_count_what_does_not_exceed_them() -> None:
    histogram = Histogram()
    histogram.observe(0.001)
    histogram.observe(0.0011, times=2)
    histogram.observe(100.0)
    buckets = dict(histogram.buckets())
    assert (buckets["0.001"], buckets["0.002"], buckets["60.0"], buckets["+Inf"]) == (1, 3, 3, 4)


def test_a_meter_counts_gaps_between_tokens_only() -> None:
    meter = Meter()
    meter.started("DISK", 7)
    meter.tokens(1, RequestTimes(queue=0.5, adapter_load=0.2, ttft=0.9))
    meter.tokens(3, None)
    assert (meter.record.requests, meter.record.prompt_tokens, meter.record.generation_tokens) == ({"DISK": 1}, 7, 4)
    assert dict(meter.record.inter_token.buckets())["+Inf"] == 3
    assert (meter.record.queue.sum, meter.record.ttft.sum, meter.record.adapter_load.sum) == (0.5, 0.9, 0.2)
