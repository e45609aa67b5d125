"""The chart's CPU trial as podman plays it, out of the images of `make images`: it answers a call. `make kube-play`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.bench.servers import embedded_model
from tests.cli.conftest import run_cli
from tests.conftest import ROOT
from tests.deploy.conftest import Documents
from tests.inference.http.pair import eventually

pytestmark = pytest.mark.podman

BASE_MODEL = "smollm2-135m-instruct"
CLAIM = "multilora-trial-model"
# As deploy/docker/images.sh runs it; pods take what they have no field for from the configuration.
PODMAN = ["podman", "--storage-driver", "vfs", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
CONFIGURATION = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
"""


def podman(*arguments: str | Path) -> str:
    ended = subprocess.run([*PODMAN, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def built(image: str) -> bool:
    found = subprocess.run([*PODMAN, "image", "exists", f"localhost/multilora-{image}:dev"], check=False)
    return found.returncode == 0


def on_this_host(documents: Documents) -> list[dict[str, object]]:
    """What podman plays of the chart, on the host's network; it knows no Services, so the store is told by address."""
    played = [each for (kind, _), each in documents.items() if kind in ("Deployment", "PersistentVolumeClaim")]
    for part in ("store", "inference"):
        pod = documents["Deployment", part]["spec"]["template"]["spec"]
        pod["hostNetwork"] = True
        for container in pod["containers"]:
            del container["ports"]  # they are the host's already
            container["args"] = [flag.replace("multilora-store:", "127.0.0.1:") for flag in container["args"]]
    return played


@pytest.fixture
def trial(rendered: Callable[..., Documents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if shutil.which("podman") is None or not all(map(built, ("adapter-store", "inference"))):
        pytest.skip("podman or one of the images is not here: `make kube-play` builds them")
    documents = rendered("--set", f"image.tag=dev,model.claim={CLAIM}")
    manifest, configuration = tmp_path / "trial.yaml", tmp_path / "containers.conf"
    manifest.write_text(yaml.safe_dump_all(on_this_host(documents)))
    configuration.write_text(CONFIGURATION)
    monkeypatch.setenv("CONTAINERS_CONF", str(configuration))
    podman("volume", "create", CLAIM)
    try:
        mountpoint = Path(podman("volume", "inspect", CLAIM, "--format", "{{.Mountpoint}}"))
        shutil.copy(embedded_model(), mountpoint / "model.gguf")
        podman("kube", "play", manifest)
        yield
    finally:
        subprocess.run([*PODMAN, "kube", "down", manifest], capture_output=True, check=False)
        subprocess.run([*PODMAN, "volume", "rm", "--force", CLAIM, "multilora-store"], capture_output=True, check=False)


def ready(port: int) -> bool:
    """What the pod's readiness probe is told."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.usefixtures("trial")
def test_the_cpu_trial_answers_a_call() -> None:
    for port in (50072, 50071):
        eventually(lambda port=port: ready(port), within=240.0)
    for command in (
        ("base-models", "register", BASE_MODEL, "--from-server", "--accept", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("adapters", "register", "pirate", str(ROOT / "tests/assets/adapters/pirate"), "--base-model", BASE_MODEL),
        ("generate", "--chat", "--adapter", "pirate", "--max-tokens", "12", "Tell me about the sea."),
    ):
        ended = run_cli(*command)
        assert ended.returncode == 0, ended.stderr
    assert "Arr" in ended.stdout
