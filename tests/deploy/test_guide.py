"""docs/operating.md: each command in a block marked `run`, in order, against real services."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.usage import Sample, write_samples
from tests.assets.random_adapter import make_random_adapter
from tests.conftest import ROOT, TINY_BASE, inference_config, run_inference, run_store
from tests.deploy.conftest import HELM

GUIDE = ROOT / "docs/operating.md"


def commands(marked: bool) -> list[str]:
    blocks = re.findall(r"^```sh( run)?\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return [
        line
        for mark, block in blocks
        if bool(mark) == marked
        for line in block.splitlines()
        if not line.startswith("#")
    ]


@pytest.fixture(scope="module")
def workplace(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Both services, and a directory as the guide's reader has it; the environment by which the commands find them."""
    root = tmp_path_factory.mktemp("guide")
    (root / "deploy").symlink_to(ROOT / "deploy")
    for seed, name in enumerate(("my-adapter", "my-adapter-2")):
        make_random_adapter(root / name, tiny_model, seed=seed, base_model_name_or_path=TINY_BASE)
    write_samples(root / "usage.jsonl", [Sample(60.0 * minute, "a:8000", 20 + minute, 8) for minute in range(5)])
    (root / "bin").mkdir()
    multilora = root / "bin/multilora"
    multilora.write_text(f'#!/bin/sh\nexec {sys.executable} -m services.cli.main "$@"\n')
    multilora.chmod(multilora.stat().st_mode | stat.S_IXUSR)
    if HELM.exists():
        (root / "bin/helm").symlink_to(HELM)
    with run_store(root / "store") as store:
        config = inference_config(tiny_model, root / "cache", adapter_store=store.address, threads=1)
        with run_inference(config) as server:
            yield os.environ | {
                "HOME": str(root),
                "MULTILORA_SERVER": server.address,
                "MULTILORA_SERVER_ADMIN": server.admin,
                "MULTILORA_STORE": store.address,
                "MULTILORA_STORE_ADMIN": store.address,
                "PATH": f"{root}/bin:{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "protos"))),
            }


def test_commands_marked_run_do(workplace: dict[str, str]) -> None:
    for line in commands(marked=True):
        if line.startswith("helm ") and not HELM.exists():
            continue
        command = line.replace("helm upgrade --install", "helm template")
        ended = subprocess.run(
            ["sh", "-c", command], cwd=workplace["HOME"], env=workplace, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{line}\n{ended.stdout}{ended.stderr}"


def test_an_install_takes_ten_commands_whose_values_exist() -> None:
    install = [line for line in commands(marked=False) if re.search(r"# \d+", line)]
    assert [re.findall(r"# (\d+)", line)[0] for line in install] == list(map(str, range(1, 11)))
    for line in commands(marked=False):
        words = shlex.split(line, comments=True)
        if words[0] == "helm":
            assert (ROOT / words[words.index("--values") + 1]).is_file()
