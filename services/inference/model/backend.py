"""Chooses what runs the model. Whoever needs to know which path serves asks here."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import torch

from lora_kernels.cpu import UnavailableError, load_library
from lora_kernels.cpu.build import level_of_this_machine
from lora_kernels.cpu.decoder import LANES
from services.common.memory_plan import MemoryPlan
from services.inference.adapters.slot_pool import SlotPool
from services.inference.config import ConfigError, ServerConfig
from services.inference.engine.interfaces import Runner
from services.inference.model.attention import KVCache
from services.inference.model.compiled_runner import CompiledRunner, compiled_cache, compiled_decoder
from services.inference.model.config import ModelConfig
from services.inference.model.decoder import Decoder
from services.inference.model.device_memory import DeviceMemory
from services.inference.model.runner import ModelRunner
from services.inference.model.sampler import Sampler
from services.inference.model.weights import load_weights
from services.inference.model.widest_step import measured_activations

log = logging.getLogger(__name__)


def build_runner(config: ServerConfig, model: ModelConfig, num_blocks: int, pool: SlotPool, sampler: Sampler) -> Runner:
    """Load the weights and set the KV cache aside, for the path that `--cpu-backend` and this machine allow.

    Raises ConfigError when the compiled path is asked for and cannot be had.
    """
    threads = config.threads or available_cores()
    torch.set_num_threads(threads)
    compiled = _compiled_can_be_had(config)
    weights = load_weights(config.model, model)
    if compiled:
        cache = compiled_cache(model, num_blocks, config.block_size)
        return CompiledRunner(compiled_decoder(model, weights, cache, pool, threads), cache, pool, sampler)
    return ModelRunner(Decoder(model, weights), _paged_cache(config, model, num_blocks), pool, sampler)


def build_planned_runner(
    config: ServerConfig, model: ModelConfig, plan: MemoryPlan, pool: SlotPool, sampler: Sampler, memory: DeviceMemory
) -> tuple[Runner, MemoryPlan]:
    """The torch path on a device: load the weights, measure the widest step, and give the KV cache what that leaves.

    Raises FailedPrecondition when it leaves too little.
    """
    decoder = Decoder(model, load_weights(config.model, model))

    def runner(num_blocks: int) -> Runner:
        return ModelRunner(decoder, _paged_cache(config, model, num_blocks), pool, sampler)

    plan = plan.with_activations(measured_activations(runner, plan.room, pool, memory))
    return runner(plan.num_blocks), plan


def _paged_cache(config: ServerConfig, model: ModelConfig, num_blocks: int) -> KVCache:
    return KVCache(model.num_layers, num_blocks, config.block_size, model.num_kv_heads, model.head_dim, model.dtype)


def available_cores() -> int:
    """The cores this process may use: those it may run on, within its control group's share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.floor(int(quota) / int(period))))


def _compiled_can_be_had(config: ServerConfig) -> bool:
    """Says in the log which path serves. Raises ConfigError where the compiled one must and cannot."""
    if config.cpu_backend == "torch":
        log.info("the model runs in torch, as --cpu-backend says")
        return False
    try:
        if config.block_size % LANES:
            raise UnavailableError(f"--block-size is {config.block_size}, and it takes multiples of {LANES}")
        load_library()
    except UnavailableError as error:
        if config.cpu_backend == "compiled":
            raise ConfigError(f"--cpu-backend is compiled, which cannot be had: {error}") from error
        log.warning("the model runs in torch; the compiled path, several times faster, cannot be had: %s", error)
        return False
    log.info("the model runs compiled, for %s", level_of_this_machine())
    return True
