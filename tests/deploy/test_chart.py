"""What the chart renders, against the services it starts."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from services.adapter_store.__main__ import parse_arguments
from services.inference.__main__ import _parser
from tests.deploy.conftest import CHART, Documents, container

Helm = Callable[..., subprocess.CompletedProcess[str]]
Render = Callable[..., Documents]

TLS = "security.tlsSecret=tls,security.storeCaSecret=store"
ALL_VALUES = sorted(path.stem for path in (CHART / "values").glob("*.yaml"))


@pytest.mark.parametrize("values", ALL_VALUES)
def test_the_services_take_the_flags_they_are_started_with(
    values: str, rendered: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = rendered(values=values)
    store, inference = container(documents, "store"), container(documents, "inference")
    for variable in store.get("env", []):
        monkeypatch.setenv(variable["name"], variable["value"])
    assert parse_arguments(store["args"]).port == 50052
    assert _parser().parse_args(inference["args"]).adapter_store == "multilora-store:50052"


NOT_IN_THE_CHART = {
    "--help",
    "--insecure",  # by its variable
    "--admin-port",  # and where the store's is: 10 above
    "--adapter-store-admin",
    "--adapter-root",  # no directory of a pod is anybody's to stage files in
    "--engine-process",  # for debugging
    "--index",  # by the variable in its secret
}


def test_every_flag_of_the_services_is_a_value(rendered: Render, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    offered = {"store": flags_of(capsys.readouterr().out), "inference": flags_of(_parser().format_help())}
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    everything = (
        "security.clientCaSecret=ca,security.storeCertSecret=own,security.auditLog=-,store.s3.endpoint=http://x"
    )
    documents = rendered("--set", everything, values="many-gpus")
    for part, flags in offered.items():
        values = {f"--{flag}" for flag in schema[part]["properties"]["flags"]["properties"]}
        assert flags == values | flags_of(" ".join(container(documents, part)["args"])) | NOT_IN_THE_CHART & flags


def flags_of(text: str) -> set[str]:
    """But `--no-flag`, which goes with `--flag`."""
    return set(re.findall(r"(?<![\w-])--(?!no-)[a-z][-a-z0-9]+", text))


def test_switches_and_lists_are_flags_as_well(rendered: Render, tmp_path: Path) -> None:
    flags = {"enable-prefix-caching": False, "fully-sharded-loras": True, "share-weight": ["acme=2", "beta=0.5"]}
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({"inference": {"flags": flags}, "store": {"flags": {"uri-root": ["s3://b/p"]}}}))
    documents = rendered("--values", str(values))
    taken = _parser().parse_args(container(documents, "inference")["args"])
    assert (taken.enable_prefix_caching, taken.fully_sharded_loras) == (False, True)
    assert taken.weights == [("acme", 2.0), ("beta", 0.5)]
    assert "--uri-root=s3://b/p" in container(documents, "store")["args"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--set", "inference.replicas=many"], "inference.replicas"),
        (["--set", "inference.device=tpu"], "inference.device"),
        (["--set", "inference.flags.max-loars=8"], "max-loars"),
        (["--set", "inference.flags.max-lora-rank=1024"], "max-lora-rank"),
        (["--set", "model.claim="], "model.claim"),
        (["--set", "model.path=/etc/passwd"], "model.path"),
        (["--set", "store.volume.size=big"], "store.volume.size"),
        (["--set", "secret=hunter2"], "secret"),
        (["--set", "inference.warmAdapters={a\\,b}"], "warmAdapters"),
        (["--set", "store.replicas=2"], "give store.s3.bucket and store.redis.secret"),
        (["--set", "inference.device=cuda"], "cuda needs gpus"),
        (["--set", "inference.device=cuda", "--set", "inference.gpus=2"], "tensor-parallel-size, one GPU a rank, 1"),
        (["--set", "security.insecure=false"], "anybody could call"),
        (["--set", "security.clientCaSecret=ca"], "give security.tlsSecret"),
        (["--set", f"{TLS},security.clientCaSecret=ca"], "give security.storeCertSecret"),
        (["--set", "security.tlsSecret=tls"], "give security.storeCaSecret"),
        (["--set", "security.tokensSecret=tokens"], "give security.storeTokenSecret"),
        (["--set", "inference.autoscaling.min=9"], "autoscaling.min is above"),
        (["--set", "security.auditLog=/var/audit"], "security.auditLog"),
    ],
)
def test_wrong_values_are_refused(flags: list[str], says: str, helm: Helm) -> None:
    ended = helm(*flags)
    assert ended.returncode != 0
    assert says.replace(".", "/") in ended.stderr or says in ended.stderr, ended.stderr


def test_a_replica_on_two_gpus(helm: Helm) -> None:
    flags = ("device=cuda", "gpus=2", "flags.tensor-parallel-size=2")
    ended = helm(*(part for flag in flags for part in ("--set", f"inference.{flag}")))
    assert ended.returncode == 0, ended.stderr
    for line in ("nvidia.com/gpu: 2", "- --tensor-parallel-size=2", "mountPath: /dev/shm"):
        assert line in ended.stdout


def test_a_file_of_changes_is_where_a_volume_keeps_it(rendered: Render, helm: Helm) -> None:
    file = ("--set", "security.auditLog=/data/audit.jsonl")
    documents = rendered(*file)
    assert "--audit-log=/data/audit.jsonl" in container(documents, "store")["args"]
    assert "/data" in [mount["mountPath"] for mount in container(documents, "store")["volumeMounts"]]
    assert "--audit-log=-" in container(documents, "inference")["args"]
    assert "no volume that keeps it" in helm(*file, values="many-gpus").stderr


@pytest.mark.parametrize("values", ALL_VALUES)
def test_pods_are_restricted_and_say_why_they_end(values: str, rendered: Render) -> None:
    documents = rendered(values=values)
    for part in ("store", "inference"):
        pod = documents["Deployment", part]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        only = container(documents, part)
        assert only["terminationMessagePolicy"] == "FallbackToLogsOnError"
        assert only["securityContext"]["readOnlyRootFilesystem"]
        assert only["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"hostPath", "hostNetwork"}.isdisjoint(json.dumps(pod))
        budget = documents["PodDisruptionBudget", part]["spec"]
        assert (
            budget["selector"]["matchLabels"].items()
            <= documents["Deployment", part]["spec"]["template"]["metadata"]["labels"].items()
        )


def test_a_pod_outlives_the_grace_it_gives_its_requests(rendered: Render) -> None:
    documents = rendered("--set", "inference.shutdownGrace=300")
    pod = documents["Deployment", "inference"]["spec"]["template"]["spec"]
    assert "--shutdown-grace=300" in container(documents, "inference")["args"]
    sleep = container(documents, "inference")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= 300 + sleep + 10


def test_secrets_are_named_and_never_values(rendered: Render) -> None:
    documents = rendered(values="many-gpus")
    store = container(documents, "store")
    assert [each["secretRef"]["name"] for each in store["envFrom"]] == ["multilora-s3", "multilora-redis"]
    assert "--tokens=/secrets/tokens/tokens" in store["args"]
    volumes = documents["Deployment", "store"]["spec"]["template"]["spec"]["volumes"]
    assert {"multilora-tls", "multilora-tokens"} <= {
        each["secret"]["secretName"] for each in volumes if "secret" in each
    }
    assert not [kind for kind, _ in documents if kind == "Secret"]


@pytest.mark.parametrize("flags", [(), ("--set", f"{TLS},security.clientCaSecret=ca,security.storeCertSecret=own")])
@pytest.mark.parametrize("values", ALL_VALUES)
def test_readiness_is_the_health_the_services_serve(values: str, flags: tuple[str, ...], rendered: Render) -> None:
    documents = rendered(*flags, values=values)
    for part, port in (("store", 50072), ("inference", 50071)):
        only = container(documents, part)
        assert only["startupProbe"]["grpc"] == only["readinessProbe"]["grpc"] == {"port": port}
        assert f"--health-port={port}" in only["args"]


def test_who_must_show_certificates_has_them(rendered: Render) -> None:
    flags = "security.clientCaSecret=ca,security.storeCertSecret=own,monitoring.certSecret=scraper"
    documents = rendered("--set", flags, values="one-gpu")
    replica = _parser().parse_args(container(documents, "inference")["args"])
    assert replica.tls_client_ca == "/secrets/client-ca/ca.crt"
    assert [str(path) for path in (replica.adapter_store_cert, replica.adapter_store_key)] == [
        "/secrets/store-cert/tls.crt",
        "/secrets/store-cert/tls.key",
    ]
    tls = documents["ServiceMonitor", "inference"]["spec"]["endpoints"][0]["tlsConfig"]
    assert tls["cert"]["secret"] | {"key": "tls.key"} == tls["keySecret"]
    assert tls["keySecret"]["name"] == "scraper"


def test_nothing_is_open_beyond_the_namespace_unless_named(rendered: Render) -> None:
    for part in ("store", "inference"):
        policy = rendered()["NetworkPolicy", part]["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert all("namespaceSelector" not in peer for rule in policy["ingress"] for peer in rule["from"])


def test_an_autoscaler_owns_the_number_of_replicas(rendered: Render) -> None:
    documents = rendered(values="many-gpus")
    assert "replicas" not in documents["Deployment", "inference"]["spec"]
    (metric,) = documents["HorizontalPodAutoscaler", "inference"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "vllm_num_requests_waiting"


def test_alerts_and_dashboard_go_in_as_they_lie(rendered: Render) -> None:
    documents = rendered(values="one-gpu")
    rules = documents["PrometheusRule", "alerts"]["spec"]["groups"][0]["rules"]
    assert len(rules) == (CHART / "files/alerts.yaml").read_text().count("- alert:")
    board = documents["ConfigMap", "dashboard"]["data"]["multilora.json"]
    assert json.loads(board) == json.loads(Path(CHART / "files/dashboard.json").read_text())
