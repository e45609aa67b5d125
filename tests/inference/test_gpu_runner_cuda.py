"""The GPU's runner on a GPU: with graphs, without, after a capture that failed, and ahead of what was read.

`make test-gpu` runs these; everywhere else they are skipped.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from services.bench.engine.gpu import RandomAdapter
from services.inference.adapters.slot_pool import SlotPool
from services.inference.engine.interfaces import LaunchedStep, ScheduledRequest
from services.inference.engine.request import Request, SamplingParams, StoppingParams
from services.inference.model.attention import KVCache
from services.inference.model.config import ModelConfig, RopeScaling
from services.inference.model.decoder import Decoder
from services.inference.model.gpu_runner import Capture, Forward, GpuRunner, cuda_graphs, decode_buckets
from services.inference.model.lora import group_shapes
from services.inference.model.sampler import Sampler
from services.inference.model.weights import expected_shapes

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; `make test-gpu` where there is one"),
]

BLOCK_SIZE, BLOCKS_EACH = 16, 4
MOST = 6
SLOTS = (None, 0, 1, None, 0, 1)
STEPS = 24


@dataclass
class Model:
    """Random weights and two adapters; each runner has a cache of its own."""

    decoder: Decoder
    pool: SlotPool

    def runner(self, capture: Capture | None) -> GpuRunner:
        config = self.decoder.config
        blocks = 1 + BLOCKS_EACH * len(SLOTS)
        heads = (config.num_kv_heads, config.head_dim)
        cache = KVCache(config.num_layers, blocks, BLOCK_SIZE, *heads, config.dtype, self.pool.device)
        return GpuRunner(self.decoder, cache, self.pool, Sampler(), max_num_seqs=MOST, capture=capture)


def make_model(device: torch.device) -> Model:
    config = ModelConfig(
        name="random",
        architecture="LlamaForCausalLM",
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(),
        tie_word_embeddings=False,
        max_model_len=BLOCK_SIZE * BLOCKS_EACH,
        eos_token_ids=frozenset(),
        dtype_name="bfloat16",
        hf_config={},
    )
    random = torch.Generator().manual_seed(7)
    weights = {
        name: (torch.randn(shape, generator=random) * 0.05).to(device, config.dtype)
        for name, shape in expected_shapes(config).items()
    }
    pool = SlotPool(group_shapes(config), config.num_layers, 2, 32, config.dtype, device=device)
    torch.manual_seed(7)
    for rank in (16, 32):
        pool.load(RandomAdapter(str(rank), config, rank, pinned=device.type == "cuda"))
    if device.type == "cuda":
        torch.cuda.synchronize()
    pool.poll()
    return Model(Decoder(config, weights), pool)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(torch.device("cuda"))


def drawn(index: int) -> SamplingParams:
    """Every other request, and so that the device always finds the token."""
    return SamplingParams(temperature=0.8, top_k=20, seed=index) if index % 2 else SamplingParams()


def answers(runner: GpuRunner, *, ahead: bool = False) -> list[list[int]]:
    """A prefill, and decode steps with fewer and fewer of the requests."""
    requests = []
    for index in range(len(SLOTS)):
        prompt = [3 + (7 * at * (index + 1)) % 4000 for at in range(5 + 4 * index)]
        blocks = list(range(1 + index * BLOCKS_EACH, 1 + (index + 1) * BLOCKS_EACH))
        requests.append(
            Request(str(index), prompt, drawn(index), StoppingParams(STEPS * (index + 1) // MOST), block_ids=blocks)
        )
    read: Callable[[], None] = int  # nothing yet
    while step := [
        ScheduledRequest(request, request.num_uncomputed_tokens, slot)
        for request, slot in zip(requests, SLOTS, strict=True)
        if not request.is_ending
    ]:
        launched = runner.launch(step)
        assert launched.runs_ahead
        for scheduled in step:
            scheduled.request.advance(scheduled.num_tokens)
        read_this = functools.partial(take_in, step, [each.request.num_computed_tokens for each in step], launched)
        if ahead:
            read()
            read = read_this
        else:
            read_this()
    read()
    return [request.output_token_ids for request in requests]


def take_in(step: Sequence[ScheduledRequest], ends: Sequence[int], launched: LaunchedStep) -> None:
    for scheduled, end, token in zip(step, ends, launched.read(), strict=True):
        assert token is not None and token.error is None and not token.late
        scheduled.request.token_ids[end] = token.token_id


def test_graphs_say_what_eager_steps_say(model: Model) -> None:
    runner = model.runner(cuda_graphs())
    assert runner.capture_failures == 0
    assert answers(runner) == answers(model.runner(None))


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_launched_ahead_finds_the_tokens_on_the_device(model: Model, graphs: bool) -> None:
    capture = cuda_graphs() if graphs else None
    assert answers(model.runner(capture), ahead=True) == answers(model.runner(capture))


def test_a_capture_that_fails_leaves_the_device_usable(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """A wait in the middle of a capture, which CUDA refuses: counted, said once, and steps run eagerly."""

    def refused(forward: Forward) -> Forward:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
            torch.cuda.synchronize()
        return forward

    with caplog.at_level(logging.WARNING):
        runner = model.runner(refused)
    assert runner.capture_failures == 2 * len(decode_buckets(MOST))
    assert len(caplog.records) == 1
    assert answers(runner) == answers(model.runner(None))
