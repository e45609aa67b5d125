"""/metrics as Prometheus and the gateway read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families as text_string_to_metric_families

from services.common.call_metrics import CallCounts
from services.inference.engine.messages import EngineStats, ResidentAdapter
from services.inference.engine.request import AdapterVersion
from services.inference.http.metrics import render
from services.inference.traffic import Traffic
from tests.inference.http.pair import ADAPTER

NAMES = {
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "multilora:num_requests_parked",
    "multilora:parkings_total",
    "multilora:requests_refused_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
    "vllm:lora_adapter_load_total",
    "vllm:lora_adapter_evict_total",
    "vllm:lora_adapters_active",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "multilora:preemptions_total",
    "multilora:steps_total",
    "multilora:name_snapshot_age_seconds",
}


TRANSITIONS = "multilora:adapter_transitions_total"
BY_LABEL = {"vllm:lora_requests_by_adapter", "multilora:lora_requests_by_adapter", "multilora:lora_adapters"}
BY_ADAPTER = {
    "multilora:requests_total",
    "multilora:prompt_tokens_total",
    "multilora:generation_tokens_total",
    *(
        f"{name}_{part}"
        for name in (
            "multilora:queue_time_seconds",
            "multilora:time_to_first_token_seconds",
            "multilora:inter_token_latency_seconds",
            "vllm:lora_adapter_load_duration_ms",
            "multilora:lora_adapter_load_duration_seconds",
        )
        for part in ("bucket", "count", "sum")
    ),
}


def samples(families: Iterable[Metric]) -> dict[str, tuple[dict[str, str], float]]:
    """All but those that have several samples of a name."""
    several = BY_ADAPTER | BY_LABEL | {TRANSITIONS}
    found = [sample for family in families for sample in family.samples if sample.name not in several]
    assert max(Counter(sample.name for sample in found).values()) == 1
    return {sample.name: (sample.labels, sample.value) for sample in found}


def scrape(http: httpx.Client) -> dict[str, tuple[dict[str, str], float]]:
    return samples(text_string_to_metric_families(http.get("/metrics").text))


@pytest.mark.parametrize("accept", ["*/*", "application/openmetrics-text; version=1.0.0,text/plain;q=0.5"])
def test_names_are_those_operators_watch(http: httpx.Client, accept: str) -> None:
    """Prometheus asks for OpenMetrics first, in which the library would write no colons."""
    answer = http.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("text/plain")
    assert set(samples(text_string_to_metric_families(answer.text))) == NAMES
    names = {sample.name for family in text_string_to_metric_families(answer.text) for sample in family.samples}
    assert names >= BY_LABEL


def test_values_move_with_requests(http: httpx.Client) -> None:
    before = scrape(http)
    body = {"model": ADAPTER, "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    after = scrape(http)

    def moved(name: str) -> float:
        return after[name][1] - before[name][1]

    assert moved("vllm:prompt_tokens_total") == 3
    assert moved("vllm:generation_tokens_total") == 4
    assert moved("multilora:steps_total") == 4
    assert after["vllm:lora_adapters_active"][1] == 1
    assert after["vllm:lora_adapter_load_total"][1] == 1
    labels, when = after["vllm:lora_requests_info"]
    assert labels == {"max_lora": "8", "waiting_lora_adapters": "", "running_lora_adapters": "pirate"}
    assert when >= before["vllm:lora_requests_info"][1]
    assert after["vllm:cache_config_info"][0]["block_size"] == "16"
    moves = [line for line in http.get("/metrics").text.splitlines() if line.startswith(TRANSITIONS)]
    assert f'{TRANSITIONS}{{from="CPU",to="LOADING"}} 1.0' in moves
    assert len(moves) == 5, "each arrow from the store to a slot"


def test_traffic_is_told_by_adapter(http: httpx.Client) -> None:
    def scraped() -> Counter[tuple[str, str]]:
        """Values by name and adapter, over all tiers; of a histogram all buckets as one."""
        found: Counter[tuple[str, str]] = Counter()
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples:
                if sample.labels.get("tenant") and sample.labels.get("le", "+Inf") == "+Inf":
                    found[sample.name, sample.labels["adapter"]] += int(sample.value)
        return found

    body = {"model": ADAPTER, "prompt": [5, 6, 7], "max_tokens": 6, "ignore_eos": True, "stream": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    before = scraped()
    assert http.post("/v1/completions", json=body).status_code == 200
    after = scraped()
    moved = {name: after[name, "pirate"] - before[name, "pirate"] for name, of in after if of == "pirate"}
    assert moved["multilora:requests_total"] == 1
    assert moved["multilora:prompt_tokens_total"] == 3
    assert moved["multilora:generation_tokens_total"] == 6
    assert moved["multilora:time_to_first_token_seconds_count"] == moved["multilora:queue_time_seconds_count"] == 1
    assert moved["multilora:inter_token_latency_seconds_bucket"] <= 5, "tokens that came with the first have no gap"
    assert after["multilora:generation_tokens_total", "other"] == 0


def resident(name: str, tier: str, waiting: int, version: int = 1) -> ResidentAdapter:
    adapter = AdapterVersion(name, version, "sha256:0", "sha256:0", 0)
    return ResidentAdapter(adapter, tier, 0 if tier == "GPU" else None, 0, 0, waiting, 0, 8, 0, "", tier, False)


def test_waiting_leaves_out_what_is_resident() -> None:
    """Of an adapter with two versions one may run while the other waits; to a router the name is one."""
    adapters = (
        resident("t/both", "GPU", 0),
        resident("t/both", "CPU", 3, version=2),
        resident("t/awaited", "STORE", 1),
        resident("t/idle", "CPU", 0),
        resident("t/busy", "GPU", 2),
    )
    counts: dict[str, Any] = {each.name: 0 for each in fields(EngineStats)} | {
        "running": 1,
        "waiting": 2,
        "blocks": 100,
    }
    moves = {("STORE", "PULLING"): 3}
    more = {"blocks_free": 75, "adapters": adapters, "adapter_transitions": moves, "requests_by_adapter": {}}
    stats = EngineStats(**counts | more)
    found = samples(text_string_to_metric_families(render(stats, Traffic(1), 4, 0.5, 100, CallCounts()).decode()))
    assert found["vllm:lora_requests_info"][0] == {
        "max_lora": "4",
        "running_lora_adapters": "t/both,t/busy",
        "waiting_lora_adapters": "t/awaited",
    }
    assert found["vllm:kv_cache_usage_perc"][1] == 0.25
    assert found["multilora:name_snapshot_age_seconds"][1] == 0.5
    assert found["vllm:lora_adapters_active"][1] == 2


def test_requests_by_adapter_are_of_the_busiest_and_the_rest() -> None:
    adapters = tuple(
        replace(resident(name, tier, 0), adapter=AdapterVersion(name, 1, f"sha256:{name}", "", 0))
        for name, tier in (("default/a", "GPU"), ("t/b", "CPU"), ("t/c", "GPU"), ("t/idle", "GPU"), ("t/d", "STORE"))
    )
    asked = {"sha256:default/a": 5, "sha256:t/b": 7, "sha256:t/c": 2, "sha256:t/d": 1}
    counts: dict[str, Any] = {each.name: 0 for each in fields(EngineStats)} | {"blocks": 1, "adapters": adapters}
    stats = EngineStats(**counts | {"requests_by_adapter": asked, "adapter_transitions": {}})
    families = list(text_string_to_metric_families(render(stats, Traffic(1), 4, 0.5, 2, CallCounts()).decode()))
    found = {
        family.name: {tuple(sample.labels.values()): sample.value for sample in family.samples} for family in families
    }
    assert found["vllm:lora_requests_by_adapter"] == {("t/b",): 7, ("a",): 5, ("other",): 3}
    assert found["multilora:lora_requests_by_adapter"] == {
        ("t/b", "t", "CPU"): 7,
        ("a", "default", "GPU"): 5,
        ("other", "*", ""): 3,
    }
    assert found["multilora:lora_adapters"] == {("GPU",): 3, ("CPU",): 1, ("DISK",): 0, ("STORE",): 1}
