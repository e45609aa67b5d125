"""`multilora store`, and the commands of `multilora adapters` about history, files and trees, against a real store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.assets.random_adapter import make_random_adapter
from tests.cli.conftest import run_cli
from tests.conftest import TINY_BASE, StoreProcess

FILES = ("adapter_config.json", "adapter_model.safetensors")


class Command:
    """The command against one store."""

    def __init__(self, store: StoreProcess) -> None:
        self.store = store

    def __call__(self, *arguments: str, code: int = 0, actor: str = "tester") -> str:
        done = run_cli("--store-admin", self.store.address, "--actor", actor, *arguments)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stdout + done.stderr

    def json(self, *arguments: str, code: int = 0) -> Any:
        done = run_cli("--store-admin", self.store.address, *arguments, "--json")
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def cli(store: StoreProcess, tiny_model: Path) -> Command:
    store.register_base(TINY_BASE, (tiny_model / "config.json").read_text())
    return Command(store)


@pytest.fixture
def tree(tiny_model: Path, tmp_path: Path) -> Path:
    """Two sound adapters, one of another base, and a folder that is none."""
    tree = tmp_path / "tree"
    for seed, name in enumerate(("one", "two")):
        make_random_adapter(tree / name, tiny_model, seed=seed, base_model_name_or_path=TINY_BASE)
    make_random_adapter(tree / "wrong", tiny_model, base_model_name_or_path="other/model")
    (tree / "notes").mkdir()
    return tree


def test_a_tree_is_imported_and_refusals_are_told(cli: Command, tree: Path) -> None:
    rows = cli.json("adapters", "import", str(tree), "--base-model", TINY_BASE, "--tenant", "t", code=4)
    assert [(row["adapter"], row["result"], row["reason"]) for row in rows] == [
        ("t/one", "registered", ""),
        ("t/two", "registered", ""),
        ("t/wrong", "refused", "BASE_MODEL_MISMATCH"),
    ]
    told = cli("adapters", "import", str(tree), "--base-model", TINY_BASE, "--tenant", "t", code=4)
    assert "was there already" in told
    assert "other/model" in told
    cli("adapters", "import", str(tree / "notes"), "--base-model", TINY_BASE, code=3)


def test_a_dry_run_and_a_download(cli: Command, tree: Path, tmp_path: Path) -> None:
    assert "sound: 6 modules" in cli("adapters", "validate", str(tree / "one"), "--base-model", TINY_BASE)
    found = cli.json("adapters", "validate", str(tree / "wrong"), "--base-model", TINY_BASE, code=4)
    assert [finding["reason"] for finding in found["findings"]] == ["BASE_MODEL_MISMATCH"]
    assert cli.json("adapters", "list") == []
    cli("adapters", "register", "one", str(tree / "one"), "--base-model", TINY_BASE)
    cli("adapters", "download", "one", "1", str(tmp_path / "back"))
    for file in FILES:
        assert (tmp_path / "back" / file).read_bytes() == (tree / "one" / file).read_bytes()
    assert {path.name for path in (tmp_path / "back").iterdir()} == set(FILES)


def test_aliases_and_back_again(cli: Command, tree: Path) -> None:
    for name in ("one", "two"):
        cli("adapters", "register", "x", str(tree / name), "--base-model", TINY_BASE)
    cli("adapters", "rollback", "x", code=3)
    assert cli("adapters", "alias", "x", "stable", "1=90", "2=10") == (
        "default/x:stable is now default/x@1 (90), default/x@2 (10)\n"
    )
    assert cli.json("adapters", "list")[0]["aliases"] == {"stable": "1 (90) 2 (10)"}
    assert cli("adapters", "rollback", "x", actor="jane") == "default/x:stable is now default/x@1\n"
    history = cli.json("adapters", "history", "x")
    assert [(row["revision"], row["kind"], row["actor"]) for row in history] == [
        (4, "alias", "jane"), (3, "alias", "tester"), (2, "version", "tester"), (1, "version", "tester")
    ]  # fmt: skip
    assert "jane" in cli("adapters", "history", "x", "--limit", "1")
    cli("adapters", "alias", "x", "canary", "2", "--expected-revision", "3", code=4)
    cli("adapters", "alias", "x", "canary", "2", "--expected-revision", "4")
    assert cli("adapters", "unalias", "x", "canary") == "default/x:canary is deleted\n"
    for bad in ("0", "1=0", "x", "1=", "1=2=3", "-1"):
        cli("adapters", "alias", "x", "canary", "--", bad, code=2)
    cli("adapters", "delete", "x", "2")
    assert cli("adapters", "undelete", "x", "2") == "x@2 is back\n"


def test_a_whole_store_is_collected_verified_rebuilt_and_copied(cli: Command, tree: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        cli("adapters", "register", "x", str(tree / name), "--base-model", TINY_BASE)
    assert cli.json("store", "collect", "--dry-run") == {"versions": [], "blobs": 0, "bytes": 0, "digests": []}
    verified = cli.json("store", "verify")
    assert (verified["entries"], verified["problems"]) == (3, [])
    place = str(cli.store.data_dir)
    assert cli.json("store", "verify", "--blobs", place) == verified
    assert cli.json("store", "reindex", "--blobs", place)["revision"] == 3
    assert cli.json("adapters", "versions", "x")[0]["version"] == 2

    target = str(tmp_path / "target")
    first = cli.json("store", "copy", place, target)
    assert (first["entries"], first["blobs"], first["problems"]) == (3, verified["blobs"], [])
    cli("adapters", "alias", "x", "canary", "2")
    again = cli.json("store", "copy", place, target)
    assert (again["entries"], again["entries_there"], again["blobs"]) == (1, 3, 0)
    blob = next((tmp_path / "target/blobs").rglob("*/*/*"))
    blob.write_bytes(b"changed")
    assert "bytes have changed" in cli("store", "verify", "--blobs", target, code=1)
    cli("adapters", "alias", "x", "canary", "1")
    (tmp_path / "target/log/adapters/default/x/000000000003.json").unlink()
    (tmp_path / "target/log/adapters/default/x/000000000003.json").write_text("{}")
    assert "COPY_CONFLICT" in cli("store", "copy", place, target, code=4)
    cli("store", "reindex", "--blobs", "ftp://x", code=2)
