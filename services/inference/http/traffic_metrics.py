"""Traffic by adapter under `multilora:`, and adapter loads under the name vLLM's operators watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.references import DEFAULT_TENANT
from services.inference.traffic import Histogram, Record, Traffic

LABELS = ["adapter", "tenant"]
REST = ("other", "*")
"""Labels of what has no series of its own; no tenant is named so."""


def adapter_label(name: str) -> str:
    """The name by which routers and clients know an adapter: bare in the default tenant, as most clients send it."""
    return name.removeprefix(f"{DEFAULT_TENANT}/")


class TrafficCollector(Collector):
    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        rows = [(labels_of(name), record) for name, record in self._traffic.shown.items()] + [
            (REST, self._traffic.rest)
        ]

        def counter(name: str, text: str, value: Callable[[Record], int]) -> Metric:
            family = CounterMetricFamily(name, text, labels=LABELS)
            for labels, record in rows:
                family.add_metric(labels, value(record))
            return family

        def histogram(name: str, text: str, value: Callable[[Record], Histogram]) -> Metric:
            family = HistogramMetricFamily(name, text, labels=LABELS)
            for labels, record in rows:
                family.add_metric(labels, value(record).buckets(), value(record).sum)
            return family

        requests = CounterMetricFamily(
            "multilora:requests", "Requests that began, by where their adapter was then", labels=[*LABELS, "tier"]
        )
        loads = Histogram()
        for labels, record in rows:
            loads.absorb(record.adapter_load)
            for tier, count in sorted(record.requests.items()):
                requests.add_metric([*labels, tier], count)
        yield requests
        failed = CounterMetricFamily(
            "multilora:requests_failed", "Requests that failed, by status code", labels=[*LABELS, "code"]
        )
        for labels, record in rows:
            for code, count in sorted(record.failures.items()):
                failed.add_metric([*labels, code], count)
        yield failed
        yield counter("multilora:prompt_tokens", "Prompt tokens", lambda record: record.prompt_tokens)
        yield counter("multilora:generation_tokens", "Tokens sent", lambda record: record.generation_tokens)
        yield histogram("multilora:queue_time_seconds", "From arrival to the first step", lambda record: record.queue)
        yield histogram("multilora:time_to_first_token_seconds", "From arrival", lambda record: record.ttft)
        yield histogram("multilora:inter_token_latency_seconds", "Between tokens", lambda record: record.inter_token)
        text = "From arrival to the adapter in memory, where it was not there"
        yield histogram("multilora:lora_adapter_load_duration_seconds", text, lambda record: record.adapter_load)
        buckets = [(end if end == "+Inf" else f"{float(end) * 1e3:g}", count) for end, count in loads.buckets()]
        text = "Milliseconds from a request's arrival to its adapter in memory, where it was not there"
        yield HistogramMetricFamily("vllm:lora_adapter_load_duration_ms", text, buckets, loads.sum * 1e3)


def labels_of(name: str) -> tuple[str, str]:
    """An adapter's, which is named with its tenant, or the base model's."""
    return adapter_label(name), name.partition("/")[0] if "/" in name else ""
