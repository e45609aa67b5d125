"""docs/operating.md: each command in a block marked `run`, in order, against real services; and `kubectl create`."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from services.bench.certificates import Authority
from services.cli.usage import Sample, write_samples
from tests.assets.random_adapter import make_random_adapter
from tests.conftest import ROOT, TINY_BASE, inference_config, run_inference, run_store
from tests.deploy.conftest import HELM, KUBECTL, Documents, container

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
    authority = Authority(root / "authority")
    shown = authority.issue("multilora-store")
    for name, file in (("tls.crt", shown.cert), ("tls.key", shown.key), ("ca.crt", authority.ca)):
        (root / name).symlink_to(file)
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


@pytest.fixture(scope="module")
def followed(workplace: dict[str, str]) -> list[tuple[str, subprocess.CompletedProcess[str]]]:
    """The commands of blocks marked `run`, which leave their files in the workplace, and how each ended."""
    ended = []
    for line in commands(marked=True):
        if line.startswith("helm ") and not HELM.exists():
            continue
        command = ["sh", "-c", line.replace("helm upgrade --install", "helm template")]
        run = subprocess.run(command, cwd=workplace["HOME"], env=workplace, capture_output=True, text=True, check=False)
        ended.append((line, run))
    return ended


def test_commands_marked_run_do(followed: list[tuple[str, subprocess.CompletedProcess[str]]]) -> None:
    assert followed
    for line, ended in followed:
        assert ended.returncode == 0, f"{line}\n{ended.stdout}{ended.stderr}"


@pytest.mark.usefixtures("followed")
@pytest.mark.skipif(not KUBECTL.exists(), reason="kubectl is not here: `make k8s-check` fetches it")
@pytest.mark.parametrize("values", ["one-gpu", "many-gpus"])
def test_the_secrets_that_are_made_are_those_the_chart_wants(
    values: str, workplace: dict[str, str], rendered: Callable[..., Documents]
) -> None:
    made: dict[str, set[str]] = {}
    for line in commands(marked=False):
        words = shlex.split(line.split("|")[0], comments=True)
        if words[0] == "kubectl" and "create" in words:
            dry = dict.fromkeys(("--dry-run=client", "--output=json", *words[1:]))
            dry.pop("--output=yaml", None)
            ended = subprocess.run(
                [KUBECTL, *dry], cwd=workplace["HOME"], env=workplace, capture_output=True, text=True, check=False
            )
            assert ended.returncode == 0, f"{line}\n{ended.stderr}"
            document = json.loads(ended.stdout)
            made[document["metadata"]["name"]] = set(document.get("data", ()))
    documents = rendered(values=values)
    environment = container(documents, "store").get("envFrom", ())
    assert {"multilora", *(each["secretRef"]["name"] for each in environment)} <= set(made)
    for wanted, key in wanted_secrets(documents):
        assert key in made[wanted], f"{wanted} has no {key}"


def wanted_secrets(documents: Documents) -> Iterator[tuple[str, str]]:
    """Name and key of each that a pod reads as a file, or Prometheus asks for; names alone tell no keys."""
    endpoint = documents["ServiceMonitor", "inference"]["spec"]["endpoints"][0]
    yield endpoint["authorization"]["credentials"]["name"], endpoint["authorization"]["credentials"]["key"]
    for part in ("store", "inference"):
        pod = documents["Deployment", part]["spec"]["template"]["spec"]
        names = {each["name"]: each["secret"]["secretName"] for each in pod["volumes"] if "secret" in each}
        read = re.findall(r"/secrets/([^/]+)/(\S+)", " ".join(pod["containers"][0]["args"]))
        assert {volume for volume, _ in read} == set(names)
        yield from ((names[volume], key) for volume, key in read)


def test_the_guides_claim_is_the_one_that_is_mounted(rendered: Callable[..., Documents]) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    volumes = rendered(values="one-gpu")["Deployment", "inference"]["spec"]["template"]["spec"]["volumes"]
    claims = [each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each]
    assert claims == [yaml.safe_load(block)["metadata"]["name"]]


def test_an_install_takes_ten_commands_whose_values_exist() -> None:
    install = [line for line in commands(marked=False) if re.search(r"# \d+", line)]
    assert [re.findall(r"# (\d+)", line)[0] for line in install] == list(map(str, range(1, 11)))
    for line in commands(marked=False):
        words = shlex.split(line, comments=True)
        if words[0] == "helm":
            assert (ROOT / words[words.index("--values") + 1]).is_file()
