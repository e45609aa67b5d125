"""The two paths on a CPU: which one serves, and that the compiled one is as good as torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.cpu import load_library
from services.bench.peers.model import write_directory
from services.inference.adapters.slot_pool import SlotPool
from services.inference.config import ConfigError, ServerConfig
from services.inference.engine.interfaces import Runner, SampledToken, ScheduledRequest
from services.inference.engine.request import Request, SamplingParams, StoppingParams
from services.inference.model.backend import build_runner
from services.inference.model.compiled_runner import CompiledRunner, compiled_cache, compiled_decoder
from services.inference.model.config import load_config
from services.inference.model.lora import group_shapes
from services.inference.model.runner import ModelRunner
from services.inference.model.sampler import GreedyRows, Sampler
from services.inference.model.weights import load_weights
from tests.assets.tiny_model import make_tiny_llama
from tests.conftest import inference_config

PROMPTS = [[3 + (7 * index * (seed + 1)) % 500 for index in range(20 + 5 * seed)] for seed in range(12)]


class Listening(Sampler):
    """Keeps the logits it is shown."""

    def needs_logits(self, request: Request) -> bool:  # noqa: ARG002
        return True

    def sample(
        self, logits: Tensor, requests: Sequence[Request], greedy: GreedyRows | None = None
    ) -> list[SampledToken]:
        self.logits = logits.clone()
        return super().sample(logits, requests, greedy)


def runner(model: Path, tmp_path: Path, sampler: Sampler, dtype: str = "float32", **settings: Any) -> Runner:
    config = inference_config(model, tmp_path, dtype=dtype, threads=1, **settings)
    found = load_config(model, dtype=dtype, max_model_len=256)
    return build_runner(config, found, 64, SlotPool(group_shapes(found), found.num_layers, 1, 8, found.dtype), sampler)


def prompt_logits(model: Path, tmp_path: Path, dtype: str, cpu_backend: str, **settings: Any) -> Tensor:
    """[prompts, vocab]: what follows each of PROMPTS."""
    sampler = Listening()
    running = runner(model, tmp_path, sampler, dtype, cpu_backend=cpu_backend, **settings)
    step = []
    for index, prompt in enumerate(PROMPTS):
        request = Request(str(index), prompt, SamplingParams(), StoppingParams(max_tokens=1))
        request.block_ids = list(range(1 + 5 * index, 6 + 5 * index))
        step.append(ScheduledRequest(request, len(prompt)))
    tokens = running.launch(step).read()
    assert [token.token_id for token in tokens if token] == sampler.logits.argmax(-1).tolist()
    return sampler.logits


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing in the cache, and a compiler that fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "false")
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.mark.parametrize("tied", [True, False])
def test_both_paths_say_the_same_in_float32(tmp_path: Path, tied: bool) -> None:
    model = make_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    ours, theirs = (prompt_logits(model, tmp_path, "float32", backend) for backend in ("compiled", "torch"))
    assert float((ours - theirs).abs().max()) < 1e-3


def test_bfloat16_is_no_worse_than_torch(real_model: Path, tmp_path: Path) -> None:
    """Beside float32, by the worst and the mean difference and by the tokens chosen. (A random model's choices are
    within either's error.)"""
    exact = prompt_logits(real_model, tmp_path, "float32", "compiled")
    ours, theirs = (prompt_logits(real_model, tmp_path, "bfloat16", backend) for backend in ("compiled", "torch"))
    for measure in (Tensor.max, Tensor.mean):
        assert measure((ours - exact).abs()) <= measure((theirs - exact).abs())
    agree = [int((logits.argmax(-1) == exact.argmax(-1)).sum()) for logits in (ours, theirs)]
    assert agree[0] >= agree[1]


def test_a_files_own_blocks_say_what_its_weights_say(real_model: Path, tmp_path: Path) -> None:
    """Bit for bit, where they are multiplied as they are; elsewhere they are made the weights they stand for."""
    plain = write_directory(real_model, tmp_path / "plain")
    in_blocks, dense = (prompt_logits(path, tmp_path, "bfloat16", "compiled") for path in (real_model, plain))
    assert torch.equal(in_blocks, dense)


def test_eight_bits_are_near_what_they_stand_for(tiny_model: Path, tmp_path: Path) -> None:
    """Beside float32. Random weights: the layers add to the error and know nothing that outweighs it."""
    exact = prompt_logits(tiny_model, tmp_path, "float32", "compiled")
    for dtype in ("float32", "bfloat16"):
        ours = prompt_logits(tiny_model, tmp_path, dtype, "compiled", quantization="int8")
        assert 0 < float((ours - exact).abs().mean()) < 0.1 * float(exact.std())


@pytest.mark.usefixtures("no_compiler")
def test_eight_bits_are_refused_where_nothing_compiles(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--quantization is int8, which the compiled path alone serves"):
        runner(tiny_model, tmp_path, Sampler(), quantization="int8")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quantization": "int4"}, "there are none and int8"),
        ({"device": "cuda"}, "--device cuda is another"),
        ({"cpu_backend": "torch"}, "--cpu-backend torch is another"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size 2 is another"),
    ],
)
def test_eight_bits_are_refused_elsewhere(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=f"--quantization is .*{says}"):
        inference_config(tiny_model, tmp_path, **({"quantization": "int8"} | settings))


@pytest.mark.usefixtures("no_compiler")
def test_torch_serves_where_nothing_compiles(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(runner(tiny_model, tmp_path, Sampler()), ModelRunner)
    assert len(caplog.records) == 1 and "cannot be had" in caplog.text
    with pytest.raises(ConfigError, match="--cpu-backend is compiled"):
        runner(tiny_model, tmp_path, Sampler(), cpu_backend="compiled")


def test_torch_serves_blocks_the_compiled_path_does_not_take(tiny_model: Path, tmp_path: Path) -> None:
    assert isinstance(runner(tiny_model, tmp_path, Sampler(), block_size=24), ModelRunner)
    assert isinstance(runner(tiny_model, tmp_path, Sampler(), block_size=32), CompiledRunner)


def test_a_gpu_that_is_not_there_is_refused(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as it is here; a GPU machine runs this too
    with pytest.raises(ConfigError, match="sees no GPU"):
        runner(tiny_model, tmp_path, Sampler(), "bfloat16", device="cuda")


def test_each_device_has_its_dtypes(tiny_model: Path, tmp_path: Path) -> None:
    def config(**settings: Any) -> ServerConfig:
        return inference_config(tiny_model, tmp_path, **settings)

    assert [config(device=device).model_dtype for device in ("cpu", "cuda")] == ["float32", "bfloat16"]
    assert config(device="cuda", dtype="float16").model_dtype == "float16"
    for device, dtype in (("cpu", "float16"), ("cuda", "float32")):
        with pytest.raises(ConfigError, match=f"--dtype is '{dtype}'; served on --device {device} are auto"):
            config(device=device, dtype=dtype)


def test_what_is_packed_is_given_back(tiny_model: Path) -> None:
    """No weight is in memory twice, packed and not."""
    config = load_config(tiny_model, max_model_len=64)
    weights = load_weights(tiny_model, config)
    pool = SlotPool(group_shapes(config), config.num_layers, 1, 8, config.dtype)
    compiled_decoder(config, weights, compiled_cache(config, 8, 16), pool, threads=1)
    assert not weights
