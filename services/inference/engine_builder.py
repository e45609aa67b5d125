"""Puts an engine together: weights, KV cache, slot pool, adapters, scheduler. The one place that knows them all."""

from __future__ import annotations

import queue
import time

from services.common.gguf_config import open_gguf
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
from services.inference.model.backend import build_runner, device_of
from services.inference.model.config import ModelConfig
from services.inference.model.lora import group_shapes
from services.inference.model.sampler import Sampler


def build_engine(
    config: ServerConfig,
    model: ModelConfig,
    inbox: queue.SimpleQueue[EngineInput],
    *,
    sampler: Sampler | None = None,
    step_log: StepLog | None = None,
) -> EngineLoop:
    """Load the weights, set the KV cache and the slot pool aside, and wire the engine; nothing runs yet."""
    num_blocks = config.kv_cache_memory_bytes // (model.kv_bytes_per_token * config.block_size)
    limits = SchedulerConfig(
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
    room = config.adapters
    pool = SlotPool(
        group_shapes(model),
        model.num_layers,
        room.max_loras,
        room.max_lora_rank,
        model.dtype,
        room.num_slots,
        device_of(config),
    )
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
    runner = build_runner(config, model, num_blocks, pool, sampler or Sampler())
    open_gguf.cache_clear()
    return EngineLoop(Engine(Scheduler(limits, adapters), runner, adapters, time.monotonic, step_log), inbox)
