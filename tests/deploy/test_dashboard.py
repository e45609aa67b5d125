"""Every query of the dashboard and of the alerts, against a real Prometheus that scrapes both services."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from services.cli.usage import IN_WINDOW
from tests.assets.random_adapter import make_random_adapter
from tests.cli.conftest import run_cli
from tests.clients import failure, generate, request
from tests.conftest import TINY_BASE, InferenceServer, inference_config, run_inference, run_store
from tests.deploy.conftest import CHART, alerts_file, needs
from tests.inference.http.pair import ADAPTER, eventually


def dashboard_queries() -> list[str]:
    board = json.loads((CHART / "files/dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return [query.replace("$__rate_interval", "5s") for query in queries]


def alert_queries() -> dict[str, str]:
    rules = yaml.safe_load(alerts_file().read_text())["groups"][0]["rules"]
    return {rule["alert"]: rule["expr"] for rule in rules}


class Prometheus:
    """replica: an inference service that it scrapes."""

    replica: InferenceServer

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series that answer. Raises HTTPError when the query is none."""
        with urllib.request.urlopen(f"{self.url}/api/v1/query?query={quote(query)}", timeout=10) as answer:
            return list(json.load(answer)["data"]["result"])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextmanager
def run_prometheus(directory: Path, **targets: str) -> Iterator[Prometheus]:
    jobs = [{"job_name": f"multilora-{job}", "static_configs": [{"targets": [at]}]} for job, at in targets.items()]
    config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": jobs}
    directory.mkdir()
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    with subprocess.Popen(command) as process:
        try:
            prometheus = Prometheus(port)
            eventually(prometheus.ready)
            yield prometheus
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def prometheus(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scraping a store and a replica that have answered, and one adapter of which overflows and fails its requests."""
    root, metrics_port = tmp_path_factory.mktemp("monitored"), free_port()
    adapter = make_random_adapter(root / "adapter", tiny_model, base_model_name_or_path=TINY_BASE)
    broken = make_random_adapter(root / "broken", tiny_model, base_model_name_or_path=TINY_BASE, std=1e30)
    with run_store(root / "store", "--metrics-port", str(metrics_port)) as store:
        store.register_base(TINY_BASE, (tiny_model / "config.json").read_text())
        store.register(ADAPTER, adapter, TINY_BASE)
        store.register("broken", broken, TINY_BASE)
        config = inference_config(tiny_model, root / "cache", adapter_store=store.address, threads=1)
        with run_inference(config) as server:
            targets = {"store": f"127.0.0.1:{metrics_port}", "inference": server.http.removeprefix("http://")}
            with run_prometheus(root / "prometheus", **targets) as prometheus:
                # of each job two scrapes after an answer, so that rates are of something
                def answered_and_scraped() -> bool:
                    generate(server.address, request([5, 6, 7], adapter=ADAPTER, max_tokens=4))
                    assert failure(server.address, request([5], adapter="broken")).reason == "NON_FINITE_LOGITS"
                    scraped = "min by (job) (count_over_time(up[10s])) >= 3 and min by (job) (up) == 1"
                    return len(prometheus.ask(scraped)) == 2

                eventually(answered_and_scraped)
                prometheus.replica = server
                yield prometheus


@needs("prometheus")
def test_every_panel_shows_something(prometheus: Prometheus) -> None:
    assert [query for query in dashboard_queries() if not prometheus.ask(query)] == []


@needs("prometheus")
def test_alerts_ask_for_what_is_exported_and_only_the_broken_adapters_fires(prometheus: Prometheus) -> None:
    firing = {alert: found for alert, query in alert_queries().items() if (found := prometheus.ask(query))}
    assert {alert: [each["metric"]["adapter"] for each in found] for alert, found in firing.items()} == {
        "MultiloraRequestsFail": ["broken"]
    }
    for query in alert_queries().values():
        for metric in re.findall(r"\b(?:vllm:|multilora:|grpc_server_)\w+(?=[\[{ ])", query):
            assert prometheus.ask(metric), metric


@needs("promtool")
def test_the_working_set_has_what_was_asked_for_once(tmp_path: Path) -> None:
    """A series that begins is an adapter's first request, but where the replica itself was not seen before."""

    def series(adapter: str, values: str, instance: str = "a") -> dict[str, str]:
        labels = f'instance="{instance}",adapter="{adapter}",tenant="{"" if adapter == "base" else "t"}",tier="GPU"'
        return {"series": f"multilora:requests_total{{{labels}}}", "values": values}

    once, later = "_x12 1x18", "_x25 1x5"
    seen = [
        {"series": 'multilora:steps_total{instance="a"}', "values": "0+9x30"},
        {"series": 'multilora:steps_total{instance="late"}', "values": "_x14 0+9x16"},
        *(series("busy", "1+2x30"), series("idle", "5x30"), series("once", once), series("later", later)),
        *(series("base", "0+9x30"), series("known for long", "_x14 9x16", "late")),
    ]
    expected = {10: {"a": 1}, 15: {"a": 2}, 20: {"a": 1}, 28: {"a": 2}}
    asked = [
        {
            "expr": IN_WINDOW,
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": f'{{instance="{name}"}}', "value": value} for name, value in values.items()],
        }
        for minute, values in expected.items()
    ]
    file = tmp_path / "usage.test.yaml"
    file.write_text(yaml.safe_dump({"tests": [{"interval": "1m", "input_series": seen, "promql_expr_test": asked}]}))
    ended = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@needs("prometheus")
def test_plan_counts_what_prometheus_saw(prometheus: Prometheus) -> None:
    eventually(lambda: bool(prometheus.ask('increase(multilora:requests_total{adapter="pirate"}[5m]) > 0')))
    ended = run_cli("plan", "--from-metrics", prometheus.url, "--hours", "0.01", "--json")
    assert ended.returncode == 0, ended.stderr
    wanted = json.loads(ended.stdout)
    assert wanted["window"] == 2
    assert wanted["max_cpu_loras"] >= wanted["max_loras"] >= 2


@needs("prometheus")
def test_plan_counts_what_a_replica_says_of_itself(prometheus: Prometheus, tmp_path: Path) -> None:
    """Read as requests go on, which they do until the command has ended."""
    page, plot = f"{prometheus.replica.http}/metrics", tmp_path / "plan.png"
    with ThreadPoolExecutor(1) as threads:
        command = ("plan", "--from-metrics", page, "--hours", "0.0015", "--json", "--plot", str(plot))
        planned = threads.submit(run_cli, *command)
        while not planned.done():
            generate(prometheus.replica.address, request([5, 6, 7], adapter=ADAPTER, max_tokens=4))
    ended = planned.result()
    assert ended.returncode == 0, ended.stderr
    wanted = json.loads(ended.stdout)
    assert (wanted["window"], wanted["max_loras"] - wanted["peak"]) == (1, 2)
    assert plot.read_bytes().startswith(b"\x89PNG")
