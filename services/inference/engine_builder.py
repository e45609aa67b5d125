"""Puts an engine together: weights, KV cache, slot pool, adapters, scheduler. The one place that knows them all."""

from __future__ import annotations

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
from services.inference.engine.loop import EngineLoop
from services.inference.engine.messages import AdaptersChanged, EngineInput
from services.inference.engine.scheduler import Scheduler
from services.inference.model.backend import build_planned_runner, build_runner
from services.inference.model.config import ModelConfig
from services.inference.model.device_memory import DeviceMemory, device_memory
from services.inference.model.lora import group_shapes
from services.inference.model.sampler import Sampler

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
    Raises FailedPrecondition when it is too small, before a weight is read if it can be told by then.
    """
    memory = memory or device_memory(config.device)
    plan = _plan(config, model, memory)
    room = config.adapters
    pool = SlotPool(
        group_shapes(model), model.num_layers, room.max_loras, room.max_lora_rank, model.dtype, room.num_slots
    )
    sampler = sampler or Sampler()
    if memory is None:
        limits = _limits(config, model, plan.num_blocks)
        runner = build_runner(config, model, plan.num_blocks, pool, sampler)
    else:
        runner, plan = build_planned_runner(config, model, plan, pool, sampler, memory)
        limits = _limits(config, model, plan.num_blocks)
    log.info("memory plan\n%s", plan.table())
    adapters = AdapterManager(
        PullClient(config.adapter_store, config.store_credentials) if config.adapter_store else None,
        DiskCache(config.data_dir / "adapters", room.max_disk_bytes),
        pool,
        BaseModelShapes(linear_shapes(model.hf_config), room.max_lora_rank, model.dtype),
        room.max_cpu_loras,
        notify=lambda: inbox.put(AdaptersChanged()),
        max_cpu_bytes=room.max_cpu_bytes,
        idle_ttl=room.adapter_idle_ttl,
    )
    open_gguf.cache_clear()
    return EngineLoop(Engine(Scheduler(limits, adapters), runner, adapters, time.monotonic, step_log), inbox)


def _plan(config: ServerConfig, model: ModelConfig, memory: DeviceMemory | None) -> MemoryPlan:
    room = Room(
        dtype=model.dtype_name,
        max_loras=config.adapters.max_loras,
        max_lora_rank=config.adapters.max_lora_rank,
        max_model_len=model.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
    )
    if memory is None:
        return plan_memory(model.hf_config, room, kv_cache_bytes=config.kv_cache_memory_bytes)
    device = Device(memory.total_bytes(), memory.free_bytes(), config.gpu_memory_utilization)
    return plan_memory(model.hf_config, room, device=device)


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
