"""`multilora bench` and `plan` over TLS with a token: adapters of its own, made by an operator, asked for in both
protocols."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import run_cli
from tests.common.auth.conftest import World


def bench(world: World, token_file: Path, *flags: str) -> dict[str, object]:
    where = ("--server", world.inference.address, "--store", world.store, "--store-admin", world.store_admin)
    shown = ("--ca", str(world.authority.ca), "--token-file", str(token_file))
    load = ("--num-prompts", "4", "--random-input-len", "4", "--random-output-len", "2", "--vocab-size", "300")
    ended = run_cli(*where, *shown, "bench", "run", *load, *flags, "--output", "json")
    assert ended.returncode == 0, ended.stderr
    metrics: dict[str, object] = json.loads(ended.stdout)["metrics"]
    return metrics


@pytest.mark.parametrize(
    ("caller", "completed", "errors"), [("ops-admin", 4, {}), ("acme-reader", 0, {"ADAPTER_NOT_FOUND": 4})]
)
def test_a_load_is_put_on_services_that_ask_for_tokens(
    world: World, tmp_path: Path, caller: str, completed: int, errors: dict[str, int]
) -> None:
    operator, token_file = tmp_path / "operator", tmp_path / "token"
    operator.write_text(world.tokens["ops-admin"])
    token_file.write_text(world.tokens[caller])
    assert bench(world, operator, "--adapters", "2", "--ranks", "4")["completed"] == 4
    names = ("--lora-modules", "bench/r4-0000,bench/r4-0001")
    https = ("--backend", "openai", "--base-url", world.https, "--model", "tiny")
    for flags in ((), https):
        metrics = bench(world, token_file, *names, *flags)
        assert (metrics["completed"], metrics["errors"]) == (completed, errors)


@pytest.mark.parametrize(("caller", "code", "says"), [("ops-reader", 3, "knows no request"), ("acme-reader", 7, "403")])
def test_a_page_of_metrics_is_for_every_tenants_callers(
    world: World, tmp_path: Path, caller: str, code: int, says: str
) -> None:
    """Shown the token over TLS; in the instant between two readings, nobody asks for an adapter."""
    token_file = tmp_path / "token"
    token_file.write_text(world.tokens[caller])
    shown = ("--ca", str(world.authority.ca), "--token-file", str(token_file))
    ended = run_cli(*shown, "plan", "--from-metrics", f"{world.https}/metrics", "--hours", "0.001")
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
