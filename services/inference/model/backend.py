"""Chooses what runs the model. Whoever needs to know which path serves asks here."""

from __future__ import annotations

import functools
import logging
import math
import os
from pathlib import Path
from typing import Any, Protocol

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
from services.inference.model.gpu_runner import GpuRunner, cuda_graphs
from services.inference.model.lora import group_shapes
from services.inference.model.memory import CPU
from services.inference.model.runner import ModelRunner
from services.inference.model.sampler import Sampler
from services.inference.model.weights import load_stored_weights, load_weights
from services.inference.model.widest_step import measured_activations, measured_graphs
from services.inference.parallel.collectives import ALONE, Collectives, Group
from services.inference.parallel.messages import SetBlocks
from services.inference.parallel.shard import WHOLE, Shard
from services.inference.parallel.workers import ParallelGpuRunner, ParallelRunner, Workers

log = logging.getLogger(__name__)


class RunnerMaker(Protocol):
    def __call__(self, num_blocks: int, /, *, graphs: bool = True) -> Runner: ...


def build_runner(config: ServerConfig, model: ModelConfig, num_blocks: int, pool: SlotPool, sampler: Sampler) -> Runner:
    """Load the weights and set the KV cache aside, for the path that the settings and this machine allow.

    Raises ConfigError when the compiled path is asked for, or eight bits are, and it cannot be had.
    """
    if device_of(config) != CPU or not _compiled_can_be_had(config):
        return _torch_runners(config, model, pool, sampler, None)(num_blocks)
    threads, weights = set_threads(config), load_stored_weights(config.model, model)
    cache = compiled_cache(model, num_blocks, config.block_size)
    decoder = compiled_decoder(model, weights, cache, pool, threads, int8=config.quantization == "int8")
    return CompiledRunner(decoder, cache, pool, sampler)


def build_planned_runner(
    config: ServerConfig,
    model: ModelConfig,
    plan: MemoryPlan,
    pool: SlotPool,
    sampler: Sampler,
    memory: DeviceMemory | None,
    workers: Workers | None,
) -> tuple[Runner, MemoryPlan]:
    """A runner with the KV blocks of the plan; on a device with those that its widest step and its graphs leave, which
    are measured.

    workers: the other ranks, which are joined here
    Raises FailedPrecondition when too few are left, Internal when a rank cannot be had.
    """
    if memory is None and workers is None:
        return build_runner(config, model, plan.num_blocks, pool, sampler), plan
    make = _torch_runners(config, model, pool, sampler, workers)
    if memory is not None:
        uncaptured = functools.partial(make, graphs=False)
        activations = measured_activations(uncaptured, plan.room, pool, memory)
        plan = plan.with_measured(activations, measured_graphs(make, uncaptured, memory))
    return make(plan.num_blocks), plan


def _torch_runners(
    config: ServerConfig, model: ModelConfig, pool: SlotPool, sampler: Sampler, workers: Workers | None
) -> RunnerMaker:
    """Load the weights; what is returned makes a runner with so many KV blocks, on all ranks."""
    set_threads(config)
    ranks: Collectives = ALONE
    if workers is None:
        decoder = load_decoder(config, model, ranks)
    else:
        ranks = Group(workers.shard)
        decoder = load_decoder(config, model, ranks)
        workers.join()

    def make(num_blocks: int, *, graphs: bool = True) -> Runner:
        blocks = SetBlocks(num_blocks, takes_gpu_runner(pool.device), graphs)
        if workers is not None:
            workers.send(blocks)
        return torch_runner(config, decoder, pool, sampler, ranks, blocks, workers)

    return make


def torch_runner(
    config: ServerConfig,
    decoder: Decoder,
    pool: SlotPool,
    sampler: Sampler,
    ranks: Collectives,
    blocks: SetBlocks,
    workers: Workers | None = None,
) -> ModelRunner | GpuRunner:
    """A rank's runner, over its part of the model and of the pool.

    workers: rank 0's, where there are others
    """
    cache = paged_cache(config, decoder.config, blocks.num_blocks)
    if not blocks.for_gpu:
        given = decoder, cache, pool, sampler, ranks
        return ModelRunner(*given) if workers is None else ParallelRunner(workers, *given)
    make = GpuRunner if workers is None else functools.partial(ParallelGpuRunner, workers)
    capture = cuda_graphs() if blocks.graphs and cache.keys.is_cuda else None
    return make(decoder, cache, pool, sampler, max_num_seqs=config.max_num_seqs, capture=capture, ranks=ranks)


def takes_gpu_runner(device: torch.device) -> bool:
    """Whether torch runs the model there by block tables, and a CPU's way otherwise."""
    return device.type == "cuda"


def pool_settings(config: ServerConfig, model: ModelConfig, shard: Shard = WHOLE) -> dict[str, Any]:
    """What a `SlotPool` for a rank's part of this model is made with."""
    room, part = config.adapters, shard.config(model)
    return {
        "shapes": group_shapes(part, shard.adapter_parts),
        "num_layers": part.num_layers,
        "max_loras": room.max_loras,
        "max_lora_rank": room.max_lora_rank,
        "dtype": part.dtype,
        "max_resident": room.num_slots,
        "rank": shard.rank,
        "device": device_of(config),
        "whole": group_shapes(model),
    }


def load_decoder(config: ServerConfig, model: ModelConfig, ranks: Collectives) -> Decoder:
    """A rank's part of the model, which is all of it for `ALONE`."""
    device, weights = device_of(config), load_weights(config.model, model, ranks.shard)
    return Decoder(ranks.shard.config(model), {name: tensor.to(device) for name, tensor in weights.items()}, ranks)


def set_threads(config: ServerConfig) -> int:
    """Threads of the forward pass, shared out among the ranks of this host."""
    threads = max(1, (config.threads or available_cores()) // config.tensor_parallel_size)
    torch.set_num_threads(threads)
    return threads


def paged_cache(config: ServerConfig, model: ModelConfig, num_blocks: int) -> KVCache:
    heads, device = (model.num_kv_heads, model.head_dim), device_of(config)
    return KVCache(model.num_layers, num_blocks, config.block_size, *heads, model.dtype, device)


def device_of(config: ServerConfig) -> torch.device:
    """Where the model runs. Raises ConfigError when this machine or this torch cannot."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device is cuda, and torch {torch.__version__} sees no GPU; install the build for its driver, or leave "
            "--device out"
        )
    if config.device == "cuda" and (count := torch.cuda.device_count()) < config.tensor_parallel_size:
        raise ConfigError(
            f"--tensor-parallel-size is {config.tensor_parallel_size}, and {count} GPUs are to be seen here: each rank "
            f"needs one; give the replica {config.tensor_parallel_size}, or lower the flag"
        )
    return torch.device(config.device)


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
        if config.quantization != "none":
            raise ConfigError(
                f"--quantization is {config.quantization}, which the compiled path alone serves, and it cannot be had: "
                f"{error}"
            ) from error
        log.warning("the model runs in torch; the compiled path, several times faster, cannot be had: %s", error)
        return False
    bits = "" if config.quantization == "none" else f", base weights in {config.quantization}"
    log.info("the model runs compiled, for %s%s", level_of_this_machine(), bits)
    return True
