"""/metrics as Prometheus and the gateway read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families as text_string_to_metric_families

from services.inference.engine.messages import EngineStats, ResidentAdapter
from services.inference.engine.request import AdapterVersion
from services.inference.http.metrics import render
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


def samples(families: Iterable[Metric]) -> dict[str, tuple[dict[str, str], float]]:
    """All but the one that counts by label."""
    found = [sample for family in families for sample in family.samples if sample.name != TRANSITIONS]
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
    assert labels == {"max_lora": "8", "waiting_lora_adapters": "", "running_lora_adapters": ADAPTER}
    assert when >= before["vllm:lora_requests_info"][1]
    assert after["vllm:cache_config_info"][0]["block_size"] == "16"
    moves = [line for line in http.get("/metrics").text.splitlines() if line.startswith(TRANSITIONS)]
    assert f'{TRANSITIONS}{{from="CPU",to="LOADING"}} 1.0' in moves
    assert len(moves) == 5, "each arrow from the store to a slot"


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
    stats = EngineStats(**counts | {"blocks_free": 75, "adapters": adapters, "adapter_transitions": moves})
    found = samples(text_string_to_metric_families(render(stats, 4, 0.5).decode()))
    assert found["vllm:lora_requests_info"][0] == {
        "max_lora": "4",
        "running_lora_adapters": "t/both,t/busy",
        "waiting_lora_adapters": "t/awaited",
    }
    assert found["vllm:kv_cache_usage_perc"][1] == 0.25
    assert found["multilora:name_snapshot_age_seconds"][1] == 0.5
    assert found["vllm:lora_adapters_active"][1] == 2
