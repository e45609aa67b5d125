"""A run in numbers, under the names that `vllm bench serve` saves them by; milliseconds for a request's times."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from services.bench.load.answer import Answer
from services.bench.quantile import quantile
from services.common.errors import InvalidArgument

_VALUES: dict[str, Callable[[Answer], list[float]]] = {
    "ttft": lambda answer: [answer.ttft],
    "tpot": lambda answer: [] if answer.tpot is None else [answer.tpot],
    "itl": lambda answer: answer.itls,
    "e2el": lambda answer: [answer.e2el],
}
METRICS = tuple(_VALUES)


@dataclass(frozen=True, slots=True)
class Wanted:
    """metrics: of METRICS; percentiles: 0 to 100"""

    metrics: tuple[str, ...] = METRICS
    percentiles: tuple[float, ...] = (95, 99)

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if metric not in _VALUES:
                raise InvalidArgument(
                    "INVALID_FIELD",
                    f"--percentile-metrics: {metric!r} is none of {', '.join(METRICS)}",
                    field="--percentile-metrics",
                )
        if not all(0 <= percentile <= 100 for percentile in self.percentiles):
            raise InvalidArgument(
                "INVALID_FIELD", "--metric-percentiles must be from 0 to 100", field="--metric-percentiles"
            )


def summarise(answers: Sequence[Answer], wanted: Wanted | None = None) -> dict[str, Any]:
    """Counts, rates and percentiles; what has no value, as when nothing was answered, is left out."""
    wanted = wanted or Wanted()
    good = [answer for answer in answers if not answer.error]
    seconds = max((answer.ended for answer in answers), default=0.0) - min((a.sent for a in answers), default=0.0)
    num_input, num_output = sum(a.num_input for a in good), sum(a.num_output for a in good)
    found: dict[str, Any] = {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "errors": dict(Counter(answer.error for answer in answers if answer.error)),
        "duration": seconds,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "adapters_asked": len({answer.adapter for answer in answers if answer.adapter}),
        "adapters_in_flight": distinct_in_flight(good),
    }
    if good:
        found["request_throughput"] = len(good) / seconds
        found["output_throughput"] = num_output / seconds
        found["total_token_throughput"] = (num_input + num_output) / seconds
    for metric in wanted.metrics:
        if values := values_of(good, metric):
            found[f"mean_{metric}_ms"] = statistics.fmean(values) * 1e3
            found[f"median_{metric}_ms"] = quantile(values, 0.5) * 1e3
            for percentile in wanted.percentiles:
                found[f"p{percentile:g}_{metric}_ms"] = quantile(values, percentile / 100) * 1e3
    return found


def values_of(answers: Sequence[Answer], metric: str) -> list[float]:
    """Every value of a metric among answers that did not fail, in seconds."""
    return [value for answer in answers if not answer.error for value in _VALUES[metric](answer)]


def distinct_in_flight(answers: Sequence[Answer]) -> float:
    """Distinct adapters asked for at once, on average over the run's time: of a batch, as a client sees it."""
    events = sorted(
        [(answer.sent, 1, answer.adapter) for answer in answers if answer.adapter]
        + [(answer.ended, -1, answer.adapter) for answer in answers if answer.adapter]
    )
    if not events:
        return 0.0
    in_flight: Counter[str] = Counter()
    area, distinct, before = 0.0, 0, events[0][0]
    for moment, change, adapter in events:
        area += distinct * (moment - before)
        before = moment
        in_flight[adapter] += change
        distinct += (change == 1 and in_flight[adapter] == 1) - (change == -1 and in_flight[adapter] == 0)
    seconds = events[-1][0] - events[0][0]
    return area / seconds if seconds else float(distinct)
