"""The memory plan: its numbers are those of the real tensors, and an engine fits into a device of a given size."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_kernels import PAGE_ROWS
from lora_kernels.cpu import Packer
from services.common import memory_plan
from services.common.errors import FailedPrecondition
from services.common.memory_plan import Device, MemoryPlan, Room, plan_memory
from services.inference.adapters.slot_pool import SlotPool
from services.inference.config import ConfigError, ServerConfig
from services.inference.engine.loop import EngineLoop
from services.inference.engine.messages import AddRequest, RequestOutput
from services.inference.engine.request import SamplingParams, StoppingParams
from services.inference.engine_builder import build_engine
from services.inference.model.attention import KVCache
from services.inference.model.config import load_config
from services.inference.model.layers import RotaryEmbedding
from services.inference.model.lora import group_shapes
from services.inference.model.memory import CPU
from services.inference.model.weights import load_weights
from services.inference.model.widest_step import token_counts
from services.inference.parallel.shard import Shard
from tests.assets.tiny_model import make_tiny_llama
from tests.conftest import inference_config
from tests.inference.adapters.lanes import HeldLanes

MIB = 1 << 20
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
ROOM = Room(
    max_loras=8,
    max_lora_rank=64,
    max_model_len=8192,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    block_size=16,
)


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that came to be in it and live, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given_before = {t.untyped_storage() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known and storage not in given_before:
                    self._known.add(storage)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


class SizedMemory:
    """A device of a given size, whose steps run on the CPU and are measured there.

    graphs: what the second runner made on it keeps beyond the first, as one with CUDA graphs would
    """

    def __init__(self, total: int, taken: int = 0, graphs: int = 0) -> None:
        self.total = total
        self.taken = taken
        self.measured: list[int] = []
        self.graphs = iter((0, graphs))

    def total_bytes(self) -> int:
        return self.total

    def free_bytes(self) -> int:
        return self.total - self.taken

    def peak_bytes(self, run: Callable[[], object]) -> int:
        with Peak() as peak:
            run()
        self.measured.append(peak.most)
        return peak.most

    def kept_bytes(self, make: Callable[[], object]) -> int:
        with Peak() as peak:
            made = make()
            kept = peak.now
        del made
        return kept + next(self.graphs, 0)


def config_of(model: Path, directory: Path, **settings: Any) -> ServerConfig:
    return inference_config(
        model, directory, cpu_backend="torch", threads=1, max_num_batched_tokens=128, max_num_seqs=8, **settings
    )


def build(config: ServerConfig, memory: SizedMemory) -> EngineLoop:
    model = load_config(config.model, dtype=config.dtype, max_model_len=config.max_model_len)
    return build_engine(config, model, queue.SimpleQueue(), memory=memory)


def test_an_8b_model_in_80_gib() -> None:
    plan = plan_memory(LLAMA_8B, ROOM, device=Device(80 << 30, 80 << 30, 0.9))
    assert plan.weights == (8_030_261_248 + 2 * 8192 * 128) * 2  # Llama 3.1 8B has that many
    assert plan.slot_pool == 8 * 335_544_320
    assert plan.block_bytes == 16 * 131_072
    assert plan.staging == 41_943_040  # two layers at rank 64 in float32
    assert plan.device is not None
    needs = plan.weights + plan.slot_pool + plan.staging + plan.activations + plan.graphs
    assert plan.graphs > 2 * (1 + 2 + 4 + 8 + 16 + 24 + 32 + 40 + 48 + 56 + 64) * 128_256 * 4, "each has its logits"
    assert 0 <= plan.device.budget - needs - plan.kv_cache < plan.block_bytes
    names = ["weights", "slot pool", "staging", "activations", "CUDA graphs", "KV cache", "budget"]
    assert [row.what for row in plan.rows()] == names


def test_adapters_by_exact_shapes_and_by_the_rule_of_thumb() -> None:
    assert memory_plan.adapter_elements(LLAMA_8B, 16) * 2 == 83_886_080
    assert memory_plan.adapter_elements_by_thumb(LLAMA_8B, 16) * 2 == 109_051_904


def test_on_a_cpu_the_flags_decide() -> None:
    plan = plan_memory(LLAMA_8B, ROOM, kv_cache_bytes=1 << 30)
    assert (plan.kv_cache, plan.num_blocks) == (1 << 30, 512)
    assert "as the flags say" in plan.table() and "no device to fill" in plan.table()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_numbers_are_those_of_the_tensors(ranks: int, tiny_model: Path) -> None:
    shard = Shard(ranks - 1, ranks)
    model = load_config(tiny_model, dtype="float32", max_model_len=256)
    room = replace(ROOM, dtype="float32", max_loras=3, max_lora_rank=40, max_model_len=256)
    room = replace(room, tensor_parallel_size=ranks)
    plan = plan_memory(model.hf_config, room, kv_cache_bytes=1 << 20)
    rotary = RotaryEmbedding(model, CPU).at(torch.arange(256))
    assert plan.weights == _bytes(load_weights(tiny_model, model, shard).values()) + _bytes(rotary)
    whole, model = model, shard.config(model)
    pool = SlotPool(group_shapes(model), model.num_layers, 3, 40, model.dtype)
    staged = SlotPool(group_shapes(model), 1, 1, 40, model.dtype, lanes=HeldLanes(), whole=group_shapes(whole))
    assert memory_plan.staging_bytes(model.hf_config, 40) == staging_of(staged)
    assert plan.slot_pool == sum(_bytes((w.a, *w.b)) for groups in pool.weights for w in groups.values())
    cache = KVCache(model.num_layers, 7, 16, model.num_kv_heads, model.head_dim, model.dtype)
    assert 7 * plan.block_bytes == _bytes((cache.keys, cache.values))
    assert memory_plan.PAGE_ROWS == PAGE_ROWS


def staging_of(pool: SlotPool) -> int:
    assert pool._copies is not None
    return sum(next(pool._copies._buffers).values.nbytes for _ in range(memory_plan.STAGING_BUFFERS))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_eight_bits_are_the_packers(tmp_path: Path, tied: bool) -> None:
    path = make_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    model = load_config(path, dtype="bfloat16", max_model_len=256)
    plan = plan_memory(model.hf_config, replace(ROOM, quantization="int8", max_model_len=256), kv_cache_bytes=1 << 20)
    weights, packer = load_weights(path, model), Packer(model.dtype, int8=True)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    packed = [name for name in weights if name.endswith("_proj.weight") or name == head]
    held = _bytes(packer.pack(weights.pop(name)).data for name in packed) + _bytes(weights.values())
    assert plan.weights == held + _bytes(RotaryEmbedding(model, CPU).at(torch.arange(256)))
    assert plan.rows()[0].how == "int8, the others bfloat16"


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_the_engine_fills_the_device_with_kv_blocks(tiny_model: Path, tmp_path: Path) -> None:
    config, memory = config_of(tiny_model, tmp_path), SizedMemory(64 * MIB, graphs=5 * MIB)
    loop = build(config, memory)
    engine = loop.engine
    plan = _planned(config)
    (measured,) = memory.measured
    staging = memory_plan.staging_bytes(load_config(tiny_model).hf_config, config.adapters.max_lora_rank)
    rest = int(64 * MIB * config.gpu_memory_utilization) - plan.weights - plan.slot_pool - staging - measured - 5 * MIB
    assert engine.scheduler.kv.pool.num_blocks == rest // plan.block_bytes > 64
    engine.adapters.check_integrity()
    engine.add(AddRequest("one", [5, 6, 7], SamplingParams(), StoppingParams(4)))
    tokens: list[int] = []
    while engine.has_requests:
        for output in engine.step():
            tokens += output.token_ids if isinstance(output, RequestOutput) else ()
    assert len(tokens) == 4
    engine.adapters.close()  # type: ignore[attr-defined]


def _planned(config: ServerConfig) -> MemoryPlan:
    model = load_config(config.model, dtype=config.dtype, max_model_len=config.max_model_len)
    room = Room(
        dtype=model.dtype_name,
        max_loras=config.adapters.max_loras,
        max_lora_rank=config.adapters.max_lora_rank,
        max_model_len=model.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
    )
    return plan_memory(model.hf_config, room)


def test_a_device_too_small_is_refused_before_a_weight_is_read(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(FailedPrecondition, match=r"the device has 10 MiB.* lower --max-loras") as refused:
        build(config_of(tmp_path, tmp_path), SizedMemory(10 * MIB))
    assert refused.value.reason == "DEVICE_TOO_SMALL"
    assert int(refused.value.metadata["lacking_bytes"]) > 0


def test_a_step_that_needs_more_than_was_computed_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    class Hungry(SizedMemory):
        def peak_bytes(self, run: Callable[[], object]) -> int:
            run()
            return 50 * MIB

    with pytest.raises(FailedPrecondition, match=r"activations 50 MiB .*lower --max-num-batched-tokens"):
        build(config_of(tiny_model, tmp_path), Hungry(48 * MIB))


def test_memory_that_others_hold_is_not_counted_on(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="the device has 64 MiB, 4 MiB of it free"):
        build(config_of(tiny_model, tmp_path), SizedMemory(64 * MIB, taken=60 * MIB))


@pytest.mark.parametrize(
    ("gib", "room", "says"),
    [
        (10, ROOM, "the weights alone do not fit; raise --tensor-parallel-size"),
        (20, replace(ROOM, max_loras=64), "lower --max-loras or --max-lora-rank$"),
        (24, replace(ROOM, max_model_len=65536), "lower --max-model-len$"),
        (24, replace(ROOM, max_loras=16, max_model_len=32768), "--max-loras or --max-lora-rank, or --max-model-len$"),
        (
            24,
            replace(ROOM, max_loras=40, max_model_len=65536),
            "--max-lora-rank, and --max-model-len, and --max-num-.*$",
        ),
    ],
)
def test_what_to_lower_is_what_would_do(gib: int, room: Room, says: str) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        plan_memory(LLAMA_8B, room, device=Device(gib << 30, gib << 30, 0.9))
    refused.match(says.replace("$", r" \[DEVICE_TOO_SMALL\]$"))


@given(
    total=st.integers(1 << 20, 1 << 38),
    free=st.floats(0, 1),
    utilization=st.floats(0.01, 1),
    loras=st.integers(1, 64),
    rank=st.integers(1, 512),
    longest=st.integers(2, 1 << 17),
)
def test_a_plan_never_exceeds_its_device(
    total: int, free: float, utilization: float, loras: int, rank: int, longest: int
) -> None:
    room = replace(ROOM, max_loras=loras, max_lora_rank=rank, max_model_len=longest)
    device = Device(total, int(total * free), utilization)
    try:
        plan = plan_memory(LLAMA_8B, room, device=device)
    except FailedPrecondition:
        return
    assert (
        plan.weights + plan.slot_pool + plan.staging + plan.activations + plan.graphs + plan.kv_cache <= device.budget
    )
    assert (plan.num_blocks - 1) * room.block_size >= longest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_widest_step_takes_no_more_than_computed(dtype: str, tiny_model: Path, tmp_path: Path) -> None:
    """Beside the adapters of the step in float32, which the torch path of a CPU keeps laid out."""
    memory = SizedMemory(1 << 30)
    config = config_of(tiny_model, tmp_path, dtype=dtype, max_model_len=128)
    build(config, memory).engine.adapters.close()  # type: ignore[attr-defined]
    plan, room = _planned(config), config.adapters
    hf_config = load_config(tiny_model).hf_config
    kept = 4 * room.max_loras * memory_plan.adapter_elements(hf_config, room.max_lora_rank)
    held = memory.measured[0] - kept
    assert plan.activations / 4 < held <= plan.activations


@given(tokens=st.integers(1, 4096), requests=st.integers(1, 256), longest=st.integers(2, 4096))
def test_the_widest_step_is_full(tokens: int, requests: int, longest: int) -> None:
    tokens = max(tokens, requests)
    room = replace(ROOM, max_num_batched_tokens=tokens, max_num_seqs=requests, max_model_len=longest)
    counts = token_counts(room)
    assert len(counts) == requests and max(counts) <= longest and min(counts) >= 1
    assert sum(counts) == min(tokens, requests * longest)


def test_a_share_of_nothing_is_refused(tiny_model: Path) -> None:
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match="--gpu-memory-utilization"):
            ServerConfig(model=tiny_model, gpu_memory_utilization=share)
