"""`multilora adapters` against a real store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.assets.random_adapter import make_random_adapter
from tests.cli.conftest import Cli
from tests.conftest import TINY_BASE
from tests.inference.http.pair import ADAPTER, Pair


@pytest.fixture
def upload(tiny_model: Path, tmp_path: Path) -> Path:
    return make_random_adapter(tmp_path / "upload", tiny_model, r=4, seed=7, base_model_name_or_path=TINY_BASE)


def printed(cli: Cli, *arguments: str) -> Any:
    """The JSON a command prints."""
    done = cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_from_upload_to_deletion(cli: Cli, upload: Path, tiny_model: Path, tmp_path: Path) -> None:
    """One adapter's life: two versions, an alias moved, the other version deleted."""
    first = cli("adapters", "register", "t/life", str(upload), "--base-model", TINY_BASE)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert first.stdout.startswith("t/life@1 is registered\n")
    assert "bound_modules  6\n" in first.stdout
    again = printed(cli, "adapters", "register", "t/life", str(upload), "--base-model", TINY_BASE)
    assert (again["version"], again["existed"], again["bound_modules"], again["max_rank"]) == (1, True, 6, 4)
    assert again["digest"] in first.stdout

    other = make_random_adapter(tmp_path / "other", tiny_model, seed=8, base_model_name_or_path=TINY_BASE)
    second = printed(cli, "adapters", "register", "t/life", str(other), "--base-model", TINY_BASE)
    assert (second["version"], second["aliases"]) == (2, [])

    (adapter,) = printed(cli, "adapters", "list", "--tenant", "t")
    assert adapter == {
        "name": "t/life",
        "aliases": {"stable": 1},
        "latest_version": 2,
        "num_versions": 2,
        "base_model": TINY_BASE,
        "revision": 2,
    }
    moved = cli("adapters", "alias", "t/life", "stable", "2")
    assert moved.stdout == "t/life:stable is now t/life@2\n"
    assert cli("adapters", "delete", "t/life", "2").returncode == 4
    deleted = cli("adapters", "delete", "t/life", "1")
    assert (deleted.returncode, deleted.stdout) == (0, "t/life@1 is deleted\n")
    assert [row["version"] for row in printed(cli, "adapters", "versions", "t/life")] == [2]
    rows = printed(cli, "adapters", "versions", "t/life", "--include-deleted")
    assert [(row["version"], row["deleted"]) for row in rows] == [(2, False), (1, True)]


def test_promote_moves_stable(cli: Cli, upload: Path) -> None:
    name = "promoted"
    flags = ("--base-model", TINY_BASE, "--promote")
    assert printed(cli, "adapters", "register", name, str(upload), *flags)["aliases"] == ["stable"]


def test_show_names_every_module(cli: Cli, pair: Pair) -> None:
    shown = printed(cli, "adapters", "show", f"{ADAPTER}@1")
    assert shown["digest"] == pair.digest
    assert shown["modules"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert {module["rank"] for module in shown["modules"]} == {8}
    assert json.loads(cli("adapters", "show", f"{ADAPTER}@1", "--output", "json").stdout) == shown
    text = cli("adapters", "show", f"{ADAPTER}@1", "--output", "table").stdout
    assert text == cli("adapters", "show", f"{ADAPTER}@1").stdout
    assert pair.digest in text
    assert text.count("self_attn") == len(shown["modules"]) == 6


def test_tables_are_whole_when_piped(cli: Cli, pair: Pair) -> None:
    listed = cli("adapters", "list")
    assert ADAPTER in listed.stdout
    assert "stable=1" in listed.stdout
    versions = cli("adapters", "versions", ADAPTER).stdout
    assert pair.digest[:19] in versions


def test_a_refused_upload_says_why(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    wrong = make_random_adapter(tmp_path / "wrong", tiny_model, base_model_name_or_path="other/model")
    refused = cli("adapters", "register", "wrong", str(wrong), "--base-model", TINY_BASE)
    assert refused.returncode == 4
    assert refused.stdout == ""
    assert refused.stderr.startswith("multilora: ")
    assert refused.stderr.count("\n") == 1
    forced = cli("adapters", "register", "wrong", str(wrong), "--base-model", TINY_BASE, "--force-base")
    assert forced.returncode == 0, forced.stderr


def test_a_directory_without_the_files(cli: Cli, tmp_path: Path) -> None:
    missing = cli("adapters", "register", "x", str(tmp_path), "--base-model", TINY_BASE)
    assert missing.returncode == 3
    assert "adapter_config.json" in missing.stderr
    nowhere = cli("adapters", "register", "x", str(tmp_path / "nowhere"), "--base-model", TINY_BASE)
    assert nowhere.returncode == 2


def test_register_uri_outside_the_roots(cli: Cli, upload: Path) -> None:
    """The store of this test has no roots, so nothing is beneath one."""
    refused = cli("adapters", "register-uri", "x", upload.as_uri(), "--base-model", TINY_BASE)
    assert refused.returncode != 0
    assert refused.stderr.startswith("multilora: ")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("versions", "nobody"), 3),
        (("show", f"{ADAPTER}@99"), 3),
        (("show", ADAPTER), 2),
        (("show", f"{ADAPTER}@{2**64}"), 2),
        (("delete", ADAPTER, str(2**64)), 2),
        (("alias", ADAPTER, "latest", "1"), 4),
        (("alias", ADAPTER, "stable", "0"), 2),
        (("delete", "nobody", "1"), 3),
        (("register", "Not A Name", "{upload}", "--base-model", TINY_BASE), 4),
        (("register", "x", "{upload}", "--base-model", "nobody"), 3),
        (("register", "x", "{upload}"), 2),
    ],
)
def test_exit_codes(cli: Cli, upload: Path, arguments: tuple[str, ...], code: int) -> None:
    done = cli("adapters", *(argument.format(upload=upload) for argument in arguments))
    assert done.returncode == code, done.stderr
