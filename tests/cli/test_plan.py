"""`multilora plan`, from samples in a file (tests/deploy asks a real Prometheus) and from a model's config."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from services.cli.page import Reading, parse, samples_of
from services.cli.plan import plan as command
from services.cli.usage import Sample, plan, write_samples
from services.common.errors import FailedPrecondition
from services.common.memory_plan import Device, Room, plan_memory
from services.inference.config import AdapterConfig, ServerConfig
from tests.cli.conftest import run_cli


@pytest.mark.parametrize(
    ("used", "max_loras", "max_cpu_loras"),
    [
        ([(10, 3), (4, 4)], 6, 12),
        ([(1, 1)], 3, 3),  # as every resident adapter has its copy in memory
        ([(0, 7)], 9, 9),  # long requests: nothing began in the window
        ([(101, 20)], 22, 122),
    ],
)
def test_slots_for_the_peak_and_memory_for_the_window(
    used: list[tuple[int, int]], max_loras: int, max_cpu_loras: int
) -> None:
    wanted = plan(Sample(float(at), "a:8000", *each) for at, each in enumerate(used))
    assert (wanted.max_loras, wanted.max_cpu_loras) == (max_loras, max_cpu_loras)
    assert not wanted.blind


def test_the_busiest_replica_counts(tmp_path: Path) -> None:
    usage = tmp_path / "usage.jsonl"
    quiet = [Sample(60.0 * minute, "quiet:8000", 2, 1) for minute in range(9)]
    busy = [Sample(60.0 * minute, "busy:8000", 20 + minute, minute) for minute in range(9)]
    write_samples(usage, [*quiet, *busy])
    ended = run_cli("plan", "--from-metrics", str(usage), "--plot", str(tmp_path / "plan.png"))
    assert ended.returncode == 0, ended.stderr
    assert [line.split()[-1] for line in ended.stdout.splitlines()] == ["28", "8", "10", "34"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_what_had_no_series_is_said(tmp_path: Path) -> None:
    write_samples(tmp_path / "usage", [Sample(0.0, "a:8000", 5, 2, 40.0)])
    ended = run_cli("plan", "--from-metrics", str(tmp_path / "usage"), "--json")
    assert json.loads(ended.stdout)["blind"]
    assert "raise --metrics-top-adapters" in ended.stderr


def reading(at: float, others: float = 0.0, /, *open_now: str, **begun: float) -> Reading:
    return Reading(at, begun, dict.fromkeys(open_now, 1.0), others)


def test_a_page_read_again_tells_what_began_since() -> None:
    readings = [
        reading(0, 9, a=5, b=1),  # whenever that was
        reading(100, 9, "b", "c", a=6, b=1, c=1),
        reading(350, 10, "b", a=6, b=1, c=1),
        reading(401, 10, a=6, b=2, c=1),
        reading(500, 0, a=1),  # after a restart
    ]
    samples = [(each.in_window, each.at_once, each.others) for each in samples_of("a:8000", readings)]
    assert samples == [(0, 0, 0), (2, 2, 0), (2, 1, 1), (1, 0, 1), (1, 0, 0)]


def test_a_page_is_read_by_its_labels() -> None:
    page = """
multilora:requests_total{adapter="pirate",tenant="default",tier="GPU"} 2.0
multilora:requests_total{adapter="pirate",tenant="default",tier="DISK"} 1.0
multilora:requests_total{adapter="base",tenant="",tier=""} 7.0
multilora:requests_total{adapter="other",tenant="*",tier="CPU"} 4.0
multilora:lora_requests_by_adapter{adapter="acme/x",tenant="acme",tier="GPU"} 1.0
multilora:lora_requests_by_adapter{adapter="other",tenant="*",tier=""} 3.0
"""
    assert parse(page, 1.0) == Reading(1.0, {"pirate": 3.0}, {"acme/x": 1.0}, 4.0)
    with pytest.raises(FailedPrecondition, match="no metrics of an inference service"):
        parse("go_goroutines 3\n", 1.0)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("", 3, "knows no request for an adapter"),
        ("not json\n", 4, "is no file that --save wrote"),
        ('{"at": 1}\n', 4, "is no file that --save wrote"),
        ("[1]\n", 4, "is no file that --save wrote"),
    ],
)
def test_files_that_hold_no_samples_are_refused(text: str, code: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "usage").write_text(text)
    ended = run_cli("plan", "--from-metrics", str(tmp_path / "usage"))
    assert (ended.returncode, ended.stderr.count("\n")) == (code, 1)
    assert says in ended.stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://127.0.0.1:9/metrics"])
def test_metrics_that_are_away_are_said(url: str) -> None:
    ended = run_cli("plan", "--from-metrics", url)
    assert ended.returncode == 5
    assert f"{url} does not answer" in ended.stderr.splitlines()[-1]


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def plan_of(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return run_cli("plan", "--config", str(tmp_path / "config.json"), *flags)


def test_memory_of_a_gpu_from_a_config_alone(tmp_path: Path) -> None:
    ended = plan_of(tmp_path, "--device-memory", "80", "--rank", "16", "--json")
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout)
    assert plan["adapters"] == [
        {"rank": 16, "exact": 83_886_080, "in_the_pool": 83_886_080, "rule_of_thumb": 109_051_904}
    ]
    room = Room(
        max_loras=8,
        max_lora_rank=64,
        max_model_len=8192,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        block_size=16,
    )
    logged = plan_memory(CONFIG, room, device=Device(80 << 30, 80 << 30, 0.9))
    assert plan["memory"] == [asdict(row) for row in logged.rows()]
    text = plan_of(tmp_path, "--device-memory", "80").stdout
    assert text.startswith(logged.table() + "\n")


def test_memory_of_a_cpu_is_as_the_flags_say(tmp_path: Path) -> None:
    ended = plan_of(tmp_path, "--kv-cache-memory-bytes", str(1 << 30))
    assert "512 blocks of 16 tokens: as the flags say" in ended.stdout
    assert "int8, the others bfloat16" in plan_of(tmp_path, "--quantization", "int8").stdout


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--device-memory", "10"], 4, "the weights alone do not fit"),
        (["--device-memory", "18", "--max-loras", "8"], 4, "lower --max-loras or --max-lora-rank"),
        (["--dtype", "int8"], 2, "int8"),
        (["--quantization", "int8", "--tensor-parallel-size", "2"], 2, "--quantization"),
        (["--from-metrics", "usage"], 2, "give one of --from-metrics and --config"),
    ],
)
def test_memory_plans_that_cannot_be_are_refused(flags: list[str], code: int, says: str, tmp_path: Path) -> None:
    ended = plan_of(tmp_path, *flags)
    assert ended.returncode == code
    assert says in ended.stderr


def test_a_config_of_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["GPT2LMHeadModel"]}))
    ended = run_cli("plan", "--config", str(tmp_path))
    assert (ended.returncode, ended.stderr.count("\n")) == (4, 1)
    assert "UNSUPPORTED_ARCHITECTURE" in ended.stderr


def test_the_plans_defaults_are_the_services() -> None:
    offered = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    for settings in (ServerConfig, AdapterConfig):
        for field in dataclasses.fields(settings):
            if field.name in offered and field.name != "dtype":
                assert offered[field.name] == field.default, field.name
