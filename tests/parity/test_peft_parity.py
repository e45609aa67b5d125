"""The promise: greedy tokens and logits are PEFT's, alone, in a mixed batch, in chunks, with slots changing hands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.gguf_config import config_from_gguf, open_gguf
from services.inference.engine.interfaces import SampledToken
from services.inference.engine.request import Request
from services.inference.model.sampler import GreedyRows, Sampler
from services.inference.tokenizer import ChatTurn, Tokenizer
from tests.assets.random_adapter import make_random_adapter
from tests.clients import generate, generate_all, request
from tests.conftest import InferenceServer, StoreProcess, inference_config, run_inference, run_store
from tests.parity.oracle import Continuation, Oracle, assert_same_tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BASE = "smollm2"
TOKENS = 64
LOGIT_TOLERANCE = 1e-3

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

ADAPTERS: dict[str, dict[str, Any]] = {
    "rank-1": {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "std": 0.12},
    "all-linear": {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION, *MLP], "std": 0.025},
    "rank-64": {"r": 64, "lora_alpha": 32, "target_modules": [*ATTENTION, *MLP], "std": 0.025},
    "odd-rank": {"r": 13, "lora_alpha": 20, "target_modules": ["o_proj", *MLP], "std": 0.03},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION, "std": 0.04},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": [*ATTENTION, "down_proj"],
        "rank_pattern": {"q_proj": 3, r"layers\.[0-4]\.self_attn\.o_proj": 17},
        "alpha_pattern": {"v_proj": 5, "down_proj": 9},
        "std": 0.03,
    },
    "some-layers": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "layers_to_transform": [1, 7, 8, 22, 29],
        "std": 0.06,
    },
    "regex": {
        "r": 5,
        "lora_alpha": 10,
        "target_modules": r".*\.(1|2)\d\.(self_attn\.v_proj|mlp\.gate_proj)",
        "std": 0.06,
    },
    "k-without-q": {"r": 32, "lora_alpha": 32, "target_modules": ["k_proj"], "std": 0.06},
}
PROMPTS = {
    "": "What is the capital of France?",
    "rank-1": "Why is the sky blue?",
    "all-linear": "Give me three tips for a good night's sleep.",
    "rank-64": "Write one sentence about the sea.",
    "odd-rank": "How do I boil an egg?",
    "rslora": "Explain what a database index is.",
    "patterns": "Name the planets of the solar system.",
    "some-layers": "Tell me a short story about a fox and a lighthouse.",
    "regex": "What is 12 times 12, and how do you know?",
    "k-without-q": "Describe autumn to someone who has never seen it.",
}


@dataclass(frozen=True)
class Case:
    """One request: which adapter ('' is the base), its prompt, and what PEFT answers."""

    adapter: str
    prompt: list[int]
    expected: Continuation
    base: Continuation


class ForcingSampler(Sampler):
    """Makes each request say given tokens, and keeps the logits it would have chosen from."""

    def __init__(self, forced: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self._forced = forced
        self.logits: dict[str, list[Tensor]] = {name: [] for name in forced}

    def needs_logits(self, request: Request) -> bool:
        return request.request_id in self.logits

    def sample(
        self, logits: Tensor, requests: Sequence[Request], greedy: GreedyRows | None = None
    ) -> list[SampledToken]:
        assert greedy is None or len(greedy.token_ids) == len(requests)
        for row, seen in zip(logits, requests, strict=True):
            self.logits[seen.request_id].append(row.clone())
        return [SampledToken(self._forced[seen.request_id][seen.num_output_tokens]) for seen in requests]


@pytest.fixture(scope="module")
def adapter_dirs(tmp_path_factory: pytest.TempPathFactory, real_model: Path) -> dict[str, Path]:
    config, root = config_from_gguf(open_gguf(real_model)), tmp_path_factory.mktemp("adapters")
    return {
        name: make_random_adapter(root / name, config, seed=seed, base_model_name_or_path=BASE, **shape)
        for seed, (name, shape) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def oracle(real_model: Path) -> Oracle:
    return Oracle(real_model)


@pytest.fixture(scope="module")
def cases(oracle: Oracle, adapter_dirs: dict[str, Path], real_model: Path) -> list[Case]:
    tokenizer = Tokenizer.load(real_model, frozenset())
    found = []
    for adapter, text in PROMPTS.items():
        prompt = tokenizer.encode_chat([ChatTurn("user", text)])
        base = oracle.generate(prompt, TOKENS)
        expected = oracle.generate(prompt, TOKENS, adapter_dirs[adapter]) if adapter else base
        found.append(Case(adapter, prompt, expected, base))
    return found


@pytest.fixture(scope="module")
def filled_store(
    tmp_path_factory: pytest.TempPathFactory, adapter_dirs: dict[str, Path], real_model: Path
) -> Iterator[StoreProcess]:
    with run_store(tmp_path_factory.mktemp("parity") / "store") as process:
        process.register_base(BASE, json.dumps(config_from_gguf(open_gguf(real_model))))
        for name, directory in adapter_dirs.items():
            process.register(name, directory, BASE)
        yield process


@contextmanager
def serving(
    model: Path, store: StoreProcess, data_dir: Path, *, sampler: Sampler | None = None, **settings: Any
) -> Iterator[InferenceServer]:
    config = inference_config(
        model,
        data_dir,
        served_model_name=BASE,
        dtype="float32",
        adapter_store=store.address,
        max_model_len=512,
        kv_cache_memory_bytes=256 << 20,
        **({"max_loras": 9} | settings),
    )
    with run_inference(config, sampler=sampler) as server:
        yield server


def message(case: Case, **fields: Any) -> Any:
    return request(case.prompt, adapter=case.adapter, max_tokens=TOKENS, **fields)


def check_answers(cases: Sequence[Case], server: InferenceServer) -> None:
    for case, answer in zip(cases, generate_all(server.address, [message(case) for case in cases]), strict=True):
        assert_same_tokens(answer.token_ids, case.expected, case.adapter or "base")


def test_adapters_change_what_is_said(cases: list[Case]) -> None:
    changed = [case for case in cases if case.adapter and case.expected.token_ids != case.base.token_ids]
    assert len(changed) >= len(ADAPTERS) - 1


def test_alone(cases: list[Case], real_model: Path, filled_store: StoreProcess, tmp_path: Path) -> None:
    with serving(real_model, filled_store, tmp_path) as server:
        for case in cases:
            assert_same_tokens(generate(server.address, message(case)).token_ids, case.expected, case.adapter or "base")
        assert all(len(step.request_ids) == 1 for step in server.steps)


def test_one_mixed_batch(cases: list[Case], real_model: Path, filled_store: StoreProcess, tmp_path: Path) -> None:
    with serving(real_model, filled_store, tmp_path) as server:
        check_answers(cases, server)
        most = max(len(set(step.adapters) - {None}) for step in server.steps)
        assert most == len(ADAPTERS) == 9, f"at most {most} distinct adapters met in one step"


def test_every_prompt_chunked(cases: list[Case], real_model: Path, filled_store: StoreProcess, tmp_path: Path) -> None:
    chunk = 12
    assert all(len(case.prompt) > chunk for case in cases)
    with serving(real_model, filled_store, tmp_path, max_num_batched_tokens=chunk, max_num_seqs=10) as server:
        check_answers(cases, server)
        assert max(sum(step.num_tokens) for step in server.steps) <= chunk


def test_two_slots(cases: list[Case], real_model: Path, filled_store: StoreProcess, tmp_path: Path) -> None:
    with serving(real_model, filled_store, tmp_path, max_loras=2, max_cpu_loras=3) as server:
        check_answers(cases, server)
        assert server.stats().slot_evictions >= len(ADAPTERS) - 2


def test_logits_under_forced_tokens(
    oracle: Oracle,
    cases: list[Case],
    adapter_dirs: dict[str, Path],
    real_model: Path,
    filled_store: StoreProcess,
    tmp_path: Path,
) -> None:
    names = {case.adapter: case.adapter or "base" for case in cases}
    sampler = ForcingSampler({names[case.adapter]: case.expected.token_ids for case in cases})
    with serving(real_model, filled_store, tmp_path, sampler=sampler) as server:
        generate_all(server.address, [message(case, request_id=names[case.adapter]) for case in cases])
    for case in cases:
        ids = case.prompt + case.expected.token_ids[:-1]
        theirs = oracle.logits(ids, adapter_dirs.get(case.adapter))[len(case.prompt) - 1 :]
        ours = torch.stack(sampler.logits[names[case.adapter]])
        assert ours.shape == theirs.shape
        worst = float((ours - theirs).abs().max())
        assert worst < LOGIT_TOLERANCE, f"{names[case.adapter]}: logits differ by {worst:.2e}"
