"""`multilora base-models` against a real store and a real replica."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.conftest import TINY_BASE


@pytest.mark.parametrize("source", ["--config", "--model", "--from-server"])
def test_a_base_model_from_each_source(cli: Cli, tiny_model: Path, source: str) -> None:
    value = {"--config": [str(tiny_model / "config.json")], "--model": [str(tiny_model)], "--from-server": []}[source]
    name = f"from{source}"
    done = cli("base-models", "register", name, source, *value, "--accept", "a/b", "--max-lora-rank", "16")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{name} is registered: 3 layers, 21 modules, adapters to rank 16\n"
    listed = {row["name"]: row for row in json.loads(cli("base-models", "list", "--json").stdout)}
    assert listed[name]["accepted_names"] == [name, "a/b"]
    assert listed[name]["max_lora_rank"] == 16
    assert listed[name]["modules"] == listed[TINY_BASE]["modules"] == 21


def test_a_gguf_file_is_read_here(cli: Cli, real_model: Path) -> None:
    """The store takes a config.json; the command makes one of the file's metadata."""
    done = cli("base-models", "register", "smollm2", "--model", str(real_model))
    assert done.returncode == 0, done.stderr
    assert "30 layers, 210 modules" in done.stdout


def test_the_same_again_changes_nothing(cli: Cli, tiny_model: Path) -> None:
    asked = ("base-models", "register", "twice", "--model", str(tiny_model))
    assert "is registered" in cli(*asked).stdout
    assert "was there already" in cli(*asked).stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 2),
        (("--from-server", "--model", "."), 2),
        (("--config", "nowhere.json"), 2),
        (("--model", "tests"), 3),
        (("--model", "pyproject.toml"), 4),
        (("--config", "pyproject.toml"), 4),
        (("--from-server", "--max-lora-rank", "513"), 4),
    ],
)
def test_exit_codes(cli: Cli, arguments: tuple[str, ...], code: int) -> None:
    done = cli("base-models", "register", "bad", *arguments)
    assert done.returncode == code, done.stderr
