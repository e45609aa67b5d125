"""One adapter's numbers never reach another's answers: not in a shared batch, and not through what it leaves behind.

The worst adapter that registration lets in is finite but huge: the forward pass of its own rows overflows to inf and
NaN. Whatever it touched (rows of a batch, KV blocks, a slot's pages) is then used by others, and their answers must be
those of a server that never saw it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_kernels.cpu import CpuCache
from multilora.inference.v1 import inference_pb2
from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.rpc import from_rpc_error
from services.inference.adapters.slot_pool import SlotPool
from services.inference.engine.interfaces import SampledToken
from services.inference.engine.request import AdapterVersion, Request, SamplingParams, StoppingParams
from services.inference.model.attention import KVCache
from services.inference.model.sampler import GreedyRows, Sampler
from tests.assets.random_adapter import make_random_adapter
from tests.clients import failure, generate, generate_all, request
from tests.conftest import TINY_BASE, InferenceServer, StoreProcess, inference_config, run_inference, run_store
from tests.inference.solo import Alone, Stream, assert_said_alone, solo

BAD = {"overflowing": 1e30, "bursting": 7e37}
"""Deviations of the weights. The second's product with any row is infinite before it is masked, with the first's only
the bad adapter's own rows are."""
ALL = r".*_proj"
GOOD: dict[str, dict[str, Any]] = {
    "thin": {"r": 3, "target_modules": ALL, "std": 0.06},
    "wide": {"r": 20, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], "std": 0.05},
    "some": {"r": 7, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1], "std": 0.15},
}
BLOCK_BYTES = 2 * 3 * 4 * 16 * 4 * 16
"""Keys and values of 16 tokens of the tiny model in float32."""
BAD_PROMPT = [3 + index % 500 for index in range(150)]


def prompt(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 512, length)]


@dataclass(frozen=True)
class Case:
    adapter: str
    prompt: list[int]
    expected: Alone

    @property
    def name(self) -> str:
        return self.adapter or "base"


def message(case: Case, **fields: Any) -> inference_pb2.GenerateRequest:
    return request(case.prompt, adapter=case.adapter, max_tokens=len(case.expected.token_ids), **fields)


@pytest.fixture(scope="module")
def store(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    root = tmp_path_factory.mktemp("isolation")
    with run_store(root / "store") as process:
        process.register_base(TINY_BASE, (tiny_model / "config.json").read_text())
        shapes = GOOD | {bad: {"r": 5, "target_modules": ALL, "std": std} for bad, std in BAD.items()}
        for seed, (name, shape) in enumerate(shapes.items()):
            made = make_random_adapter(root / name, tiny_model, seed=seed, base_model_name_or_path=TINY_BASE, **shape)
            process.register(name, made, TINY_BASE)
        yield process


Serving = Callable[..., contextlib.AbstractContextManager[InferenceServer]]


@pytest.fixture(scope="module", params=["compiled", "torch"])
def serving(request: pytest.FixtureRequest) -> Serving:
    """Starts a server whose model runs on the one path or the other."""

    def start(
        model: Path,
        store: StoreProcess,
        data_dir: Path,
        *,
        sampler: Sampler | None = None,
        blocks: int = 60,
        **room: Any,
    ) -> contextlib.AbstractContextManager[InferenceServer]:
        config = inference_config(
            model,
            data_dir,
            http_port=None,
            adapter_store=store.address,
            max_model_len=256,
            max_num_batched_tokens=48,
            max_num_seqs=16,
            kv_cache_memory_bytes=blocks * BLOCK_BYTES,
            threads=1,
            cpu_backend=request.param,
            **room,
        )
        return run_inference(config, sampler=sampler)

    return start


@pytest.fixture(scope="module")
def cases(
    serving: Serving, tiny_model: Path, store: StoreProcess, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Case]:
    """Requests of different lengths, and how a server that never saw the bad adapter answers each alone."""
    found = {}
    with serving(tiny_model, store, tmp_path_factory.mktemp("reference")) as server:
        for seed, (adapter, length) in enumerate([("", 9), ("", 70), ("thin", 23), ("wide", 5), ("some", 41)]):
            asked = request(prompt(seed, length), adapter=adapter, max_tokens=100)
            found[f"{adapter or 'base'}-{length}"] = Case(adapter, prompt(seed, length), solo(server, asked))
    return found


def runner_parts(server: InferenceServer) -> tuple[KVCache | CpuCache, SlotPool]:
    return server.runner._cache, server.runner._pool


def fails(server: InferenceServer, request_id: str = "", *, bad: str = "overflowing") -> None:
    error = failure(server.address, request(BAD_PROMPT, adapter=bad, request_id=request_id))
    assert isinstance(error, FailedPrecondition)
    assert (error.reason, error.field) == ("NON_FINITE_LOGITS", "adapter")
    assert error.metadata["adapter"] == f"default/{bad}@1"
    assert f"default/{bad}@1" in error.message


def check(server: InferenceServer, cases: Sequence[Case]) -> None:
    """All at once, every other one with its log-probabilities; then two of them alone."""
    wanted = [{}, {"output": inference_pb2.OutputParams(logprobs=0)}]
    messages = [message(case, **wanted[index % 2]) for index, case in enumerate(cases)]
    for case, answer in zip(cases, generate_all(server.address, messages), strict=True):
        assert_said_alone(answer, case.expected, f"{case.name}, together")
    for case in cases[:2]:
        assert_said_alone(generate(server.address, message(case)), case.expected, f"{case.name}, alone")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("max_loras", [1, 2, 8])
def test_a_bad_adapter_fails_alone_in_a_shared_batch(
    serving: Serving,
    tiny_model: Path,
    store: StoreProcess,
    cases: dict[str, Case],
    tmp_path: Path,
    max_loras: int,
    bad: str,
) -> None:
    """With one slot the bad one shares its steps with the base alone, and the good ones get its slot after it."""
    beside = {1: ["base-9", "base-70"], 2: ["base-9", "thin-23"], 8: list(cases)}[max_loras]
    with serving(tiny_model, store, tmp_path, max_loras=max_loras) as server:
        fails(server, bad=bad)  # and so is in host memory: the next one joins the step after the one it came in
        sent = [message(cases[name], request_id=name) for name in beside]
        with Stream.running(server.address, sent) as streams, ThreadPoolExecutor(1) as pool:
            with server.held():
                failed = pool.submit(fails, server, "bad", bad=bad)
                server.wait_in_flight("bad")
            failed.result()
            for name, stream in zip(beside, streams, strict=True):
                assert_said_alone(stream.rest(), cases[name].expected, name)
        shared = [step for step in server.steps if "bad" in step.request_ids]
        assert shared
        for name in beside:
            assert any(name in step.request_ids for step in shared), f"{name} shared no step with the bad adapter"
        check(server, list(cases.values()))
        assert max_loras == 8 or server.stats().slot_evictions > 0
        fails(server, bad=bad)


class Undaunted(Sampler):
    """Goes on with any token where logits are not finite, so that a row of NaN decodes beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self.non_finite = 0

    def sample(
        self, logits: Tensor, requests: Sequence[Request], greedy: GreedyRows | None = None
    ) -> list[SampledToken]:
        sampled = super().sample(logits, requests, greedy)
        self.non_finite += sum(token.error is not None for token in sampled)
        return [SampledToken(7) if token.error is not None else token for token in sampled]


@pytest.mark.parametrize("bad", BAD)
def test_rows_of_nan_that_decode_beside_others(
    serving: Serving, tiny_model: Path, store: StoreProcess, cases: dict[str, Case], tmp_path: Path, bad: str
) -> None:
    sampler = Undaunted()
    with serving(tiny_model, store, tmp_path, sampler=sampler) as server:
        worst = request(BAD_PROMPT, adapter=bad, max_tokens=100, request_id="bad")
        messages = [worst, *[message(case, request_id=name) for name, case in cases.items()]]
        _, *answers = generate_all(server.address, messages)
        for (name, case), answer in zip(cases.items(), answers, strict=True):
            assert_said_alone(answer, case.expected, name)
        assert sampler.non_finite == 100
        for name in cases:
            together = [step for step in server.steps if {"bad", name} <= set(step.request_ids)]
            assert sum(max(step.num_tokens) == 1 for step in together) > 20, f"{name} decoded beside it too seldom"


def test_blocks_that_a_bad_adapter_leaves(
    serving: Serving, tiny_model: Path, store: StoreProcess, cases: dict[str, Case], tmp_path: Path
) -> None:
    """A cache of 19 blocks: the bad request fills ten with NaN, and those who come after it write over them."""
    with serving(tiny_model, store, tmp_path, blocks=20) as server:
        cache, _ = runner_parts(server)

        def poisoned() -> int:
            blocks = cache.values.reshape(len(cache.values), 20, -1)
            return int((~blocks.isfinite()).any(-1).any(0).sum())

        fails(server)
        before = poisoned()
        assert before >= len(BAD_PROMPT) // 16
        check(server, list(cases.values()))
        assert poisoned() < before, "no poisoned block was used again"


def test_a_cache_full_of_nan(
    serving: Serving, tiny_model: Path, store: StoreProcess, cases: dict[str, Case], tmp_path: Path
) -> None:
    """Contexts of 5 to 170 tokens decode in one batch: padding, block tails and the null block are all NaN."""
    with serving(tiny_model, store, tmp_path) as server:
        cache, _ = runner_parts(server)
        for tensor in (cache.keys, cache.values):
            tensor.fill_(torch.nan)
        check(server, list(cases.values()))
        assert max(len(step.request_ids) for step in server.steps) == len(cases)
        null_block = cache.keys.reshape(len(cache.keys), -1)[:, : cache.keys[0].numel() // 60]
        assert not null_block.isfinite().any(), "the null block is nobody's to write"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_pool_full_of_poison(
    serving: Serving, tiny_model: Path, store: StoreProcess, cases: dict[str, Case], tmp_path: Path, value: float
) -> None:
    with serving(tiny_model, store, tmp_path, max_loras=2, max_cpu_loras=2) as server:
        _, pool = runner_parts(server)
        for groups in pool.weights:
            for weights in groups.values():
                for tensor in (weights.a, *weights.b):
                    tensor.fill_(value)
        check(server, list(cases.values()))
        assert server.stats().slot_evictions > 0


def test_pages_poisoned_beside_resident_adapters(
    serving: Serving, tiny_model: Path, store: StoreProcess, cases: dict[str, Case], tmp_path: Path
) -> None:
    """What nobody owns right now is NaN; the residents stay, and two more adapters move in over it."""
    with serving(tiny_model, store, tmp_path, max_loras=3) as server:
        check(server, [cases["thin-23"]] * 2)
        _, pool = runner_parts(server)
        for groups in pool.weights:
            for weights in groups.values():
                linears = list(pool.tables[weights.group].pages)
                for index, pages_of_slot in enumerate(linears):
                    owned = {page for pages in pages_of_slot for page in pages}
                    for page in set(range(pool._num_pages)) - owned:
                        rows = slice(page * 16, page * 16 + 16)
                        weights.a[index, rows] = torch.nan
                        weights.b[index][rows] = torch.nan
        check(server, list(cases.values()))


def test_one_slot_from_hand_to_hand(
    serving: Serving, tiny_model: Path, store: StoreProcess, cases: dict[str, Case], tmp_path: Path
) -> None:
    with serving(tiny_model, store, tmp_path, max_loras=1, max_cpu_loras=1, blocks=20) as server:
        for name in ("thin-23", "wide-5", "some-41"):
            fails(server)
            assert_said_alone(generate(server.address, message(cases[name])), cases[name].expected, name)
        slots = {adapter.slot for adapter in server.stats().adapters if adapter.tier == "GPU"}
        assert slots == {0}
        assert server.stats().slot_evictions == 5


# ---- the sampler


def sampled_request(seed: int, adapter: AdapterVersion | None = None, **sampling: Any) -> Request:
    return Request(
        f"r{seed}", [1, 2], SamplingParams(seed=seed, **({"temperature": 1.0} | sampling)), StoppingParams(9), adapter
    )


def test_a_row_of_nan_beside_sampled_rows() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 200) * 3
    bad = AdapterVersion("default/bad", 4, "sha256:bad", "sha256:pack", 1)
    options: list[dict[str, Any]] = [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3, "logit_bias": {3: 2.0}},
        {"temperature": 0.0},
    ]
    requests = [sampled_request(seed, **options[seed % len(options)]) for seed in range(12)]
    alone = [Sampler().sample(row[None].clone(), [seen])[0] for row, seen in zip(logits, requests, strict=True)]
    for spoiled in (float("nan"), float("inf"), float("-inf")):
        mixed, beside = logits.clone(), list(requests)
        for row in (0, 5, 11):
            mixed[row, 17] = spoiled
            beside[row] = sampled_request(row, bad)
        tokens = Sampler().sample(mixed, beside)
        for row, (found, expected) in enumerate(zip(tokens, alone, strict=True)):
            if row in (0, 5, 11):
                assert isinstance(found.error, FailedPrecondition)
                assert found.error.metadata["adapter"] == "default/bad@4"
            else:
                assert found == expected


def test_seeded_answers_beside_a_bad_adapter(
    serving: Serving, tiny_model: Path, store: StoreProcess, cases: dict[str, Case], tmp_path: Path
) -> None:
    sampling = [{"seed": 5}, {"seed": 6, "top_k": 20}, {"seed": 7, "top_p": 0.8}, {"seed": 8, "min_p": 0.05}]
    messages = [
        request(case.prompt, adapter=case.adapter, max_tokens=100, sampling=sampling[index % 4])
        for index, case in enumerate(cases.values())
    ]
    with serving(tiny_model, store, tmp_path / "reference") as server:
        alone = [generate(server.address, asked).token_ids for asked in messages]
    with serving(tiny_model, store, tmp_path / "mixed") as server:
        with Stream.running(server.address, messages) as streams:
            fails(server, "bad")
            assert [stream.rest() for stream in streams] == alone
        assert any("bad" in step.request_ids and len(step.request_ids) > 3 for step in server.steps)


# ---- the gate in front


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_registered(
    tiny_model: Path, store: StoreProcess, tmp_path: Path, value: float
) -> None:
    made = make_random_adapter(tmp_path / "nan", tiny_model, base_model_name_or_path=TINY_BASE)
    weights = load_file(made / "adapter_model.safetensors")
    first = next(iter(weights))
    weights[first][0, 0] = value
    save_file(weights, made / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(grpc.RpcError) as caught:
        store.register("not-finite", made, TINY_BASE)
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidArgument)
    assert error.reason == "NON_FINITE_WEIGHTS"
    assert first in error.message
