"""/health, and what a replica that shuts down says."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.conftest import TINY_BASE, inference_config, run_inference
from tests.inference.http.pair import Pair


def test_a_serving_replica_is_healthy(http: httpx.Client, pair: Pair) -> None:
    assert http.get("/health").status_code == 200
    assert pair.server.serving.engine.is_serving


def test_a_stopping_replica_is_not(tiny_model: Path, tmp_path: Path) -> None:
    with run_inference(inference_config(tiny_model, tmp_path)) as server, httpx.Client(base_url=server.http) as http:
        server.call(server.serving.engine.shutdown(drain=True, timeout=20))
        assert http.get("/health").status_code == 503
        refused = http.post("/v1/completions", json={"model": TINY_BASE, "prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "SHUTTING_DOWN"
        assert refused.json()["error"]["type"] == "server_error"
