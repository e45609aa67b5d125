"""Both services as the processes they are in production, with the real model and the sample adapters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.clients import generate, request
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`multilora-inference` with these flags: the process, and its gRPC address once it answers."""
    command = [sys.executable, "-m", "services.inference", "--port", "0", "--http-port", "-1", "--admin-port", "-1"]
    command += arguments
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            line = running.stdout.readline().strip()
            assert line.startswith("listening on grpc="), f"the service did not start: {line!r}"
            yield running, line.removeprefix("listening on grpc=")
        finally:
            if running.poll() is None:
                running.kill()


def fails(*arguments: str) -> str:
    """What `multilora-inference` says when it refuses to start; it must be one line, and exit code 2."""
    command = [sys.executable, "-m", "services.inference", "--port", "0", "--http-port", "-1", "--admin-port", "-1"]
    command += arguments
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("multilora-inference: "), ended.stderr
    return last


def test_demo_shows_three_adapters_and_the_base_in_one_batch(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "deploy/demo.py", "run", "--data-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "up to 3 adapters and the base model in one forward pass" in ended.stdout
    first, second = ended.stdout.split("The same again")
    for adapter in ("pirate", "json-only", "french"):
        cold = [line for line in first.splitlines() if f" {adapter} " in line]
        warm = [line for line in second.splitlines() if f" {adapter} " in line]
        assert len(cold) == len(warm) == 2
        assert any(" STORE " in line for line in cold)
        assert all(" GPU " in line for line in warm)
    assert "matey" in first
    assert '{"answer": "The capital of France is Paris."}' in first
    assert "La capitale de la France est Paris." in first


def test_shutdown_finishes_what_runs(tiny_model: Path, tmp_path: Path) -> None:
    with process("--model", str(tiny_model), "--data-dir", str(tmp_path)) as (running, address):
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service="multilora.inference.v1.InferenceService"))
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.Generate(request([5, 6, 7], max_tokens=300))
            assert next(call).HasField("started")
            running.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            events = list(call)
        assert sum(len(event.chunk.token_ids) for event in events) == 300
        assert events[-1].finished.reason == inference_pb2.FINISH_REASON_LENGTH
        assert running.wait(timeout=30) == 0


def test_shutdown_past_its_grace_cancels(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--model", str(tiny_model), "--data-dir", str(tmp_path), "--shutdown-grace", "0")
    with process(*flags) as (running, address):
        with grpc.insecure_channel(address) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request([5, 6, 7], max_tokens=1000))
            assert next(call).HasField("started")
            running.send_signal(signal.SIGTERM)
            last = list(call)[-1]
        assert last.finished.reason == inference_pb2.FINISH_REASON_CANCELLED
        assert running.wait(timeout=30) == 0


def test_base_model_alone_needs_no_store(tiny_model: Path, tmp_path: Path) -> None:
    with process("--model", str(tiny_model), "--data-dir", str(tmp_path)) as (_, address):
        assert len(generate(address, request([5, 6, 7], max_tokens=4)).token_ids) == 4


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--max-loras", "8", "--max-cpu-loras", "4"), "--max-cpu-loras (4) is below --max-loras (8)"),
        (("--max-loras", "8", "--max-resident-loras", "4"), "--max-resident-loras (4) is below --max-loras (8)"),
        (("--max-resident-loras", "64"), "--max-cpu-loras (32) is below --max-resident-loras (64)"),
        (("--adapter-idle-ttl", "-1"), "--adapter-idle-ttl is -1.0"),
        (("--adapter-root", "/no/such/place"), "--adapter-root: /no/such/place is no directory"),
        (("--max-lora-rank", "513"), "--max-lora-rank is 513; at most 512"),
        (("--kv-cache-memory-bytes", "4096"), "raise --kv-cache-memory-bytes"),
        (("--max-model-len", "999999"), "--max-model-len is 999999; this model goes to"),
        (("--device", "cuda"), "sees no GPU"),
        (("--dtype", "int4"), "served on --device cpu are auto, float32, bfloat16"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags: tuple[str, ...], says: str, tiny_model: Path) -> None:
    assert says in fails("--model", str(tiny_model), *flags)


def test_models_that_cannot_be_served_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    assert "nothing is at" in fails("--model", str(tmp_path / "absent"))
    model = tmp_path / "model"
    model.mkdir()
    assert "has no config.json" in fails("--model", str(model))
    config = json.loads((tiny_model / "config.json").read_text())
    for change, says in (
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not served"),
        ({"attention_bias": True}, "attention_bias=True is not served"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not served"),
    ):
        (model / "config.json").write_text(json.dumps(config | change))
        assert says in fails("--model", str(model))


def test_a_taken_port_is_said_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    with process("--model", str(tiny_model), "--data-dir", str(tmp_path)) as (_, address):
        port = address.rsplit(":", 1)[1]
        assert "cannot listen on" in fails("--model", str(tiny_model), "--port", port)
        assert "cannot listen on" in fails("--model", str(tiny_model), "--http-port", port)
