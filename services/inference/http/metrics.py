"""Prometheus metrics, read from the engine's truth at scrape time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.call_metrics import CallCounts
from services.inference.engine.messages import EngineStats, ResidentAdapter
from services.inference.http.traffic_metrics import LABELS, REST, TrafficCollector, adapter_label, labels_of
from services.inference.traffic import Traffic


def render(
    stats: EngineStats, traffic: Traffic, max_loras: int, snapshot_age: float, top_adapters: int, calls: CallCounts
) -> bytes:
    """The exposition of `stats` and `traffic` in the text format, whatever a scraper prefers: prometheus_client's
    OpenMetrics writes an underscore for each colon, and so would rename every metric."""
    registry = CollectorRegistry()
    registry.register(StatsCollector(stats, max_loras, snapshot_age, top_adapters))
    registry.register(TrafficCollector(traffic))
    registry.register(calls)
    return generate_latest(registry)


class StatsCollector(Collector):
    """One moment's stats under the names operators already watch on vLLM, and our own under `multilora:`."""

    def __init__(self, stats: EngineStats, max_loras: int, snapshot_age: float, top_adapters: int) -> None:
        """snapshot_age: seconds since the store last confirmed what names mean; inf when it never did
        top_adapters: as many have series of their own
        """
        self._stats = stats
        self._max_loras = max_loras
        self._snapshot_age = snapshot_age
        self._top_adapters = top_adapters

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        yield _gauge("vllm:num_requests_running", "Requests in the running batch", stats.running)
        yield _gauge("vllm:num_requests_waiting", "Requests that wait", stats.waiting)
        used = 1 - stats.blocks_free / stats.blocks
        yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV cache's blocks in use, 0 to 1", used)
        yield self._cache_config()
        yield self._lora_requests()
        yield _counter("vllm:lora_adapter_load", "Adapters loaded into the slot pool", stats.adapter_loads)
        yield _counter("vllm:lora_adapter_evict", "Adapters evicted from the slot pool", stats.slot_evictions)
        resident = sum(adapter.tier == "GPU" for adapter in stats.adapters)
        yield _gauge("vllm:lora_adapters_active", "Adapters resident in the slot pool", resident)
        yield from self._requests_by_adapter()
        yield self._adapters_by_tier()
        yield _counter("vllm:prompt_tokens", "Prompt tokens taken in", stats.prompt_tokens)
        yield _counter("vllm:generation_tokens", "Tokens generated", stats.generation_tokens)
        yield _counter("vllm:prefix_cache_queries", "Prompt tokens looked up", stats.prefix_queried_tokens)
        yield _counter("vllm:prefix_cache_hits", "Prompt tokens found", stats.prefix_hit_tokens)
        yield _gauge("multilora:num_requests_parked", "Requests whose adapter waits for its turn", stats.parked)
        yield _counter("multilora:parkings", "Running requests parked for another's turn or seat", stats.parkings)
        yield _counter("multilora:requests_refused", "Requests that found the queue full", stats.refused)
        yield _counter("multilora:preemptions", "Running requests put back for KV cache room", stats.preemptions)
        yield _counter("multilora:steps", "Engine steps", stats.steps)
        yield self._transitions()
        age = "Seconds since the store confirmed what adapter names mean; +Inf when it never did"
        yield _gauge("multilora:name_snapshot_age_seconds", age, self._snapshot_age)

    def _requests_by_adapter(self) -> Iterator[Metric]:
        """Now, in any state. What has no series of its own is in one."""
        open_requests: Counter[tuple[str, str]] = Counter()
        for each in self._stats.adapters:
            open_requests[each.adapter.name, each.tier] += self._stats.requests_by_adapter.get(each.adapter.digest, 0)
        text = "Requests that run, are parked or wait, by adapter"
        plain = GaugeMetricFamily("vllm:lora_requests_by_adapter", text, labels=["adapter"])
        ours = GaugeMetricFamily("multilora:lora_requests_by_adapter", text, labels=[*LABELS, "tier"])
        ranked = [(key, count) for key, count in open_requests.most_common() if count]
        by_name: Counter[str] = Counter()
        for (name, tier), count in ranked[: self._top_adapters]:
            ours.add_metric([*labels_of(name), tier], count)
            by_name[adapter_label(name)] += count
        rest = sum(count for _, count in ranked[self._top_adapters :])
        ours.add_metric([*REST, ""], rest)
        for label, count in [*by_name.items(), (REST[0], rest)]:
            plain.add_metric([label], count)
        yield plain
        yield ours

    def _adapters_by_tier(self) -> Metric:
        family = GaugeMetricFamily("multilora:lora_adapters", "Adapters known here, by where they are", labels=["tier"])
        tiers = Counter(adapter.tier for adapter in self._stats.adapters)
        for tier in ("GPU", "CPU", "DISK", "STORE"):
            family.add_metric([tier], tiers[tier])
        return family

    def _cache_config(self) -> Metric:
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Shape of the KV cache", labels=["block_size", "num_gpu_blocks"]
        )
        family.add_metric([str(self._stats.block_size), str(self._stats.blocks)], 1)
        return family

    def _transitions(self) -> Metric:
        labels = ["from", "to"]
        family = CounterMetricFamily("multilora:adapter_transitions", "Adapters' moves between states", labels=labels)
        for ends, count in sorted(self._stats.adapter_transitions.items()):
            family.add_metric(ends, count)
        return family

    def _lora_requests(self) -> Metric:
        """Value: unix time, by which routers take the newest series. Waiting leaves out what is resident."""
        running = {adapter_label(adapter.adapter.name) for adapter in self._stats.adapters if adapter.tier == "GPU"}
        awaited = {adapter_label(adapter.adapter.name) for adapter in self._stats.adapters if _is_awaited(adapter)}
        waiting = awaited - running
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters resident, and adapters with requests waiting for them",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        family.add_metric([str(self._max_loras), ",".join(sorted(waiting)), ",".join(sorted(running))], time.time())
        return family


def _is_awaited(adapter: ResidentAdapter) -> bool:
    return adapter.tier != "GPU" and adapter.waiting > 0


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
