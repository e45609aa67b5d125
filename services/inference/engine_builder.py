"""Puts an engine together: weights, KV cache, slot pool, adapters, scheduler. The one place that knows them all."""

from __future__ import annotations

import contextlib
import logging
import queue
import time

from services.common.gguf_config import open_gguf
from services.common.memory_plan import Device, MemoryPlan, Room, plan_memory
from services.common.profile import linear_shapes
from services.inference.adapters.disk_cache import DiskCache
from services.inference.adapters.manager import AdapterManager
from services.inference.adapters.packed_adapter import BaseModelShapes
from services.inference.adapters.slot_pool import SlotPool
from services.inference.adapters.store_client import PullClient
from services.inference.config import SchedulerConfig, ServerConfig
from services.inference.engine.engine import Engine, StepLog
from services.inference.engine.interfaces import Runner
from services.inference.engine.loop import EngineLoop
from services.inference.engine.messages import AdaptersChanged, EngineInput, RankDied
from services.inference.engine.scheduler import Scheduler
from services.inference.model.backend import build_planned_runner, pool_settings
from services.inference.model.config import ModelConfig
from services.inference.model.device_memory import DeviceMemory, device_memory
from services.inference.model.sampler import Sampler
from services.inference.parallel.shard import Shard
from services.inference.parallel.workers import MirroredPool, Workers

log = logging.getLogger(__name__)


def build_engine(
    config: ServerConfig,
    model: ModelConfig,
    inbox: queue.SimpleQueue[EngineInput],
    *,
    sampler: Sampler | None = None,
    step_log: StepLog | None = None,
    memory: DeviceMemory | None = None,
) -> EngineLoop:
    """Load the weights, set the KV cache and the slot pool aside, and wire the engine; nothing runs yet.

    memory: what the plan is to fill; the default is that of `--device`, and on a CPU there is none
    Raises FailedPrecondition when it is too small, before a weight is read if it can be told by then; ConfigError when
    the KV cache that the flags give a CPU is; Internal when another rank cannot be had.
    """
    memory = memory or device_memory(config.device)
    shard = Shard(0, config.tensor_parallel_size, config.fully_sharded_loras)
    settings = pool_settings(config, model, shard)
    plan = _plan(config, model, memory)
    if memory is None:
        _limits(config, model, plan.num_blocks)  # refuses a cache too small before anything is loaded
    with contextlib.ExitStack() as undo:
        workers = None
        if shard.size > 1:
            workers = Workers(config, model, shard, on_death=lambda reason: inbox.put(RankDied(reason)))
            undo.callback(workers.close)
        pool = SlotPool(**settings) if workers is None else MirroredPool(workers, **settings)
        runner, plan = build_planned_runner(config, model, plan, pool, sampler or Sampler(), memory, workers)
        log.info("memory plan\n%s", plan.table())
        engine = _engine(config, model, plan, pool, runner, inbox, step_log)
        return EngineLoop(engine, inbox, close=undo.pop_all().close)


def _engine(
    config: ServerConfig,
    model: ModelConfig,
    plan: MemoryPlan,
    pool: SlotPool,
    runner: Runner,
    inbox: queue.SimpleQueue[EngineInput],
    step_log: StepLog | None,
) -> Engine:
    room, limits = config.adapters, _limits(config, model, plan.num_blocks)
    adapters = AdapterManager(
        PullClient(config.adapter_store, config.store_credentials) if config.adapter_store else None,
        DiskCache(config.data_dir / "adapters", room.max_disk_bytes),
        pool,
        BaseModelShapes(linear_shapes(model.hf_config), room.max_lora_rank, model.dtype, pool.device.type == "cuda"),
        room.max_cpu_loras,
        notify=lambda: inbox.put(AdaptersChanged()),
        max_cpu_bytes=room.max_cpu_bytes,
        idle_ttl=room.adapter_idle_ttl,
    )
    open_gguf.cache_clear()
    return Engine(Scheduler(limits, adapters), runner, adapters, time.monotonic, step_log)


def _plan(config: ServerConfig, model: ModelConfig, memory: DeviceMemory | None) -> MemoryPlan:
    room = Room(
        dtype=model.dtype_name,
        quantization=config.quantization,
        max_loras=config.adapters.max_loras,
        max_lora_rank=config.adapters.max_lora_rank,
        max_model_len=model.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        tensor_parallel_size=config.tensor_parallel_size,
        fully_sharded_loras=config.fully_sharded_loras,
    )
    if memory is None:
        return plan_memory(model.hf_config, room, kv_cache_bytes=config.kv_cache_memory_bytes)
    device = Device(memory.total_bytes(), memory.free_bytes(), config.gpu_memory_utilization)
    return plan_memory(model.hf_config, room, device=device, to_measure=True)


def _limits(config: ServerConfig, model: ModelConfig, num_blocks: int) -> SchedulerConfig:
    return SchedulerConfig(
        max_model_len=model.max_model_len,
        num_blocks=num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        max_waiting_requests=config.max_waiting_requests,
        enable_prefix_caching=config.enable_prefix_caching,
        turn_tokens=config.turn_tokens,
        step_seconds=config.step_seconds,
        weights=config.weights,
    )
