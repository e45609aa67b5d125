"""The tools of the deployment's checks: `make k8s-check` installs them, and Prometheus where root may."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

CHART = ROOT / "deploy/chart"
HELM, KUBECTL = ROOT / ".data/k8s/bin/helm", ROOT / ".data/k8s/bin/kubectl"

Documents = dict[tuple[str, str], dict[str, Any]]
"""What a chart renders, by kind and name without the release's."""


def needs(program: str) -> pytest.MarkDecorator:
    found = shutil.which(program) is not None
    return pytest.mark.skipif(not found, reason=f"{program} is not installed: Debian's package prometheus has it")


@pytest.fixture(scope="session")
def helm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`helm template` of the chart with these flags."""
    if not HELM.exists():
        pytest.skip("helm is not here: `make k8s-check` fetches it")

    def template(*flags: str, values: str = "cpu-trial") -> subprocess.CompletedProcess[str]:
        command = [HELM, "template", "multilora", CHART, "--namespace", "multilora"]
        command += ["--values", CHART / f"values/{values}.yaml", *flags]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    return template


@pytest.fixture(scope="session")
def rendered(helm: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., Documents]:
    def render(*flags: str, values: str = "cpu-trial") -> Documents:
        ended = helm(*flags, values=values)
        assert ended.returncode == 0, ended.stderr
        documents = [document for document in yaml.safe_load_all(ended.stdout) if document]
        return {(each["kind"], each["metadata"]["name"].removeprefix("multilora-")): each for each in documents}

    return render


def container(documents: Documents, part: str) -> dict[str, Any]:
    (only,) = documents["Deployment", part]["spec"]["template"]["spec"]["containers"]
    return dict(only)


def alerts_file() -> Path:
    return CHART / "files/alerts.yaml"
