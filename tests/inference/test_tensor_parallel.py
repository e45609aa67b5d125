"""A model cut among processes: one rank's answers, no more collectives than the base needs, one death for all."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import torch.distributed as dist

from multilora.inference.v1 import inference_pb2_grpc
from services.common.errors import FailedPrecondition, Internal
from services.common.memory_plan import adapter_elements
from services.common.profile import linear_shapes
from services.common.rpc import from_rpc_error
from services.inference.adapters.packed_adapter import BaseModelShapes, PackedAdapter
from services.inference.adapters.slot_pool import SlotPool
from services.inference.config import ConfigError, ServerConfig
from services.inference.engine.interfaces import ScheduledRequest
from services.inference.engine.loop import EngineLoop
from services.inference.engine.messages import EngineDied, EngineOutput
from services.inference.engine.request import Request, SamplingParams, StoppingParams
from services.inference.engine_builder import build_engine
from services.inference.model import backend
from services.inference.model.config import load_config
from services.inference.model.gpu_runner import GpuRunner
from services.inference.parallel.messages import Load
from services.inference.parallel.shard import Shard
from services.inference.parallel.workers import MirroredPool, ParallelGpuRunner, ParallelRunner, Workers
from tests.assets.tiny_model import make_tiny_llama
from tests.clients import request
from tests.conftest import inference_config
from tests.inference.adapters.packs import ALL, make_pack
from tests.inference.test_engine_process import service, wait_gone
from tests.inference.test_memory_plan import SizedMemory

LAYERS = 3
TOKENS = 12
PROMPTS = [[3 + (7 * index * (seed + 1)) % 500 for index in range(5 + 4 * seed)] for seed in range(4)]
SHAPES: dict[str, dict[str, Any]] = {
    "all-linears": {"r": 8, "target_modules": ALL, "std": 0.05},
    "cut-by-inputs": {"r": 13, "lora_alpha": 20, "target_modules": ["o_proj", "down_proj"], "std": 0.08},
    "two-pages": {"r": 20, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "std": 0.1},
}


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PackedAdapter]:
    root, config = tmp_path_factory.mktemp("packs"), json.loads((tiny_model / "config.json").read_text())
    base = BaseModelShapes(linear_shapes(config), 32, torch.float32)
    return {
        name: make_pack(root, name, config=config, seed=seed, **shape).adapter(base)
        for seed, (name, shape) in enumerate(SHAPES.items())
    }


def settings_of(model: Path, directory: Path, **settings: Any) -> ServerConfig:
    limits = {"max_loras": 2, "max_lora_rank": 32, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    limits |= {"cpu_backend": "torch", "threads": 1}
    return inference_config(model, directory, **(limits | settings))


@contextmanager
def engine(config: ServerConfig, memory: SizedMemory | None = None) -> Iterator[EngineLoop]:
    model = load_config(config.model, dtype=config.dtype, max_model_len=64)
    loop = build_engine(config, model, queue.SimpleQueue(), memory=memory)
    try:
        yield loop
    finally:
        loop.engine.adapters.close()  # type: ignore[attr-defined]
        loop._close()


def pool_of(loop: EngineLoop) -> SlotPool:
    return loop.engine.adapters._pool  # type: ignore[attr-defined, no-any-return]


def answers(loop: EngineLoop, adapters: Sequence[PackedAdapter]) -> list[list[int]]:
    """What the base and each adapter go on to say, greedily and in one batch."""
    slots = [None, *(pool_of(loop).load(adapter).index for adapter in adapters)]
    requests = [
        Request(
            str(index),
            PROMPTS[index],
            SamplingParams(),
            StoppingParams(TOKENS),
            block_ids=list(range(1 + 4 * index, 5 + 4 * index)),
        )
        for index in range(len(slots))
    ]
    for _ in range(TOKENS):
        step = [ScheduledRequest(r, r.num_uncomputed_tokens, slot) for r, slot in zip(requests, slots, strict=True)]
        for made, token in zip(requests, loop.engine.runner.launch(step).read(), strict=True):
            assert token is not None and token.error is None
            made.num_computed_tokens = len(made.token_ids)
            made.token_ids.append(token.token_id)
    for adapter in adapters:
        pool_of(loop).evict(adapter.digest)
    return [made.token_ids[len(made.prompt_token_ids) :] for made in requests]


def in_turn(loop: EngineLoop, adapters: dict[str, PackedAdapter]) -> list[list[list[int]]]:
    """Three pairs over two slots, so that slots and pages change hands."""
    first, second, third = adapters.values()
    return [answers(loop, pair) for pair in ([first, second], [third, first], [second, third])]


@pytest.mark.parametrize("fully", [False, True])
@pytest.mark.parametrize("for_gpu", [False, True], ids=["the CPU's runner", "the GPU's"])
def test_two_ranks_say_what_one_says(
    fully: bool, for_gpu: bool, tmp_path: Path, adapters: dict[str, PackedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with a tied head, and of one whose own is cut unevenly."""
    monkeypatch.setattr(backend, "takes_gpu_runner", lambda _device: for_gpu)
    model = make_tiny_llama(tmp_path / "model", vocab_size=511 if fully else 512, tie_word_embeddings=not fully)
    with engine(settings_of(model, tmp_path)) as loop:
        assert isinstance(loop.engine.runner, GpuRunner) == for_gpu
        alone = in_turn(loop, adapters)
    assert len({tuple(batch[1]) for batch in alone}) == 3, "the adapters change nothing"
    sums: list[torch.Size] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor) -> None:
        sums.append(tensor.shape)
        all_reduce(tensor)

    config = settings_of(model, tmp_path, tensor_parallel_size=2, fully_sharded_loras=fully)
    with engine(config, SizedMemory(64 << 20)) as loop:
        assert isinstance(loop.engine.runner, ParallelGpuRunner if for_gpu else ParallelRunner)
        assert in_turn(loop, adapters) == alone
        pool_of(loop).check_integrity()
        monkeypatch.setattr(dist, "all_reduce", counted)
        answers(loop, [])
        of_base = len(sums)
        answers(loop, [adapters["all-linears"]])
        assert of_base == TOKENS * LAYERS * 2
        assert len(sums) - 2 * of_base == (TOKENS * LAYERS * 4 if fully else 0)
        lora = [tensor for groups in pool_of(loop).weights for w in groups.values() for tensor in (w.a, *w.b)]
        assert sum(map(torch.numel, lora)) == 2 * adapter_elements(load_config(model).hf_config, 32, 2, fully)


@pytest.mark.parametrize(
    ("size", "fully", "changes", "says"),
    [
        (3, False, {}, r"attention heads \(8\)"),
        (8, False, {}, r"key-value heads \(4\)"),
        (4, False, {"intermediate_size": 254}, r"intermediate size \(254\)"),
        (4, True, {"hidden_size": 130}, r"hidden size, which --fully-sharded-loras cuts, \(130\)"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(
    size: int, fully: bool, changes: dict[str, int], says: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = json.loads((tiny_model / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(model))
    config = settings_of(tmp_path, tmp_path, tensor_parallel_size=size, fully_sharded_loras=fully)
    with (
        pytest.raises(FailedPrecondition, match=rf"size is {size}: the model's {says} cannot be divided by it"),
        engine(config),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tensor_parallel_size": 2, "cpu_backend": "compiled"}, "--cpu-backend compiled, which runs on one rank"),
        ({"fully_sharded_loras": True}, "--fully-sharded-loras needs --tensor-parallel-size"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size is 0"),
    ],
)
def test_settings_that_contradict_are_refused(
    settings: dict[str, Any], says: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        settings_of(tiny_model, tmp_path, **settings)


def test_more_ranks_than_gpus_are_refused(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = settings_of(tiny_model, tmp_path, device="cuda", cpu_backend="auto", tensor_parallel_size=4)
    with (
        pytest.raises(ConfigError, match="--tensor-parallel-size is 4, and 2 GPUs are to be seen"),
        engine(config, SizedMemory(64 << 20)),
    ):
        pass


def test_a_rank_that_ends_while_it_loads(tiny_model: Path, tmp_path: Path) -> None:
    config = settings_of(tiny_model, tmp_path, tensor_parallel_size=2)
    workers = Workers(config, load_config(tiny_model), Shard(0, 2), on_death=lambda _why: None)
    try:
        workers._workers[0]._process.kill()
        with pytest.raises(Internal, match="rank 1 of 2 was killed by SIGKILL"):
            workers.join()
    finally:
        workers.close()


def test_a_rank_that_fails_between_steps_ends_the_engine(tiny_model: Path, tmp_path: Path) -> None:
    """And says why, though nobody waits for it."""
    emitted: queue.SimpleQueue[Sequence[EngineOutput]] = queue.SimpleQueue()
    config = settings_of(tiny_model, tmp_path, tensor_parallel_size=2)
    loop = build_engine(config, load_config(tiny_model, max_model_len=64), queue.SimpleQueue())
    loop.emit = emitted.put
    running = threading.Thread(target=loop.run)
    running.start()
    pool = pool_of(loop)
    assert isinstance(pool, MirroredPool)
    pool._workers.send(Load(None))  # type: ignore[arg-type]
    (died,) = emitted.get(timeout=60)
    running.join(60)
    assert isinstance(died, EngineDied)
    assert "rank 1 of 2 ended with code 1: 'NoneType' object has no attribute" in died.error


def test_a_killed_rank_ends_its_streams_the_others_and_the_service(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--model", str(tiny_model), "--data-dir", str(tmp_path), "--tensor-parallel-size", "2")
    with service(*flags, "--cpu-backend", "torch") as (running, address, leader):
        (rank,) = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
        with grpc.insecure_channel(address) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request([5, 6, 7], max_tokens=1000))
            assert next(call).HasField("started")
            os.kill(int(rank), signal.SIGKILL)
            with pytest.raises(grpc.RpcError) as ended:
                list(call)
        assert "rank 1 of 2 was killed by SIGKILL" in str(from_rpc_error(ended.value))
        assert running.wait(timeout=60) == 70
        wait_gone(leader)
        assert running.stderr is not None
        assert "rank 1 of 2 was killed by SIGKILL" in running.stderr.read().strip().splitlines()[-1]


def test_no_rank_outlives_the_first(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--model", str(tiny_model), "--data-dir", str(tmp_path), "--tensor-parallel-size", "2")
    with service(*flags, "--cpu-backend", "torch") as (running, _, leader):
        (rank,) = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
        os.kill(leader, signal.SIGKILL)
        wait_gone(int(rank))
        assert running.wait(timeout=60) == 70
