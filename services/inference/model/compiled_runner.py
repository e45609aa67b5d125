"""Runs one engine step through the compiled decoder: scheduled requests to arrays, one call, sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lora_kernels import BASE_ROW
from lora_kernels.cpu import CpuCache, CpuDecoder, DecoderShape, PackedLayer, Packer, StepBatch
from services.inference.adapters.slot_pool import SlotPool
from services.inference.engine.interfaces import SampledToken, ScheduledRequest, StepDone
from services.inference.model.config import ModelConfig
from services.inference.model.gguf_weights import StoredWeight
from services.inference.model.layers import inverse_frequencies
from services.inference.model.lora import LINEAR_GROUPS
from services.inference.model.memory import reserve
from services.inference.model.sampler import GreedyRows, Sampler
from services.inference.model.weights import dense


class CompiledRunner:
    """A step is one foreign call over rows; what a request is answered does not depend on who shares it."""

    def __init__(self, decoder: CpuDecoder, cache: CpuCache, pool: SlotPool, sampler: Sampler) -> None:
        self._decoder = decoder
        self._cache = cache
        self._pool = pool
        self._sampler = sampler

    @property
    def weight_bytes(self) -> int:
        """Of the base weights that a step reads."""
        return self._decoder.weight_bytes

    @torch.inference_mode()
    def launch(self, step: Sequence[ScheduledRequest]) -> StepDone:
        """Compute one step. See `Runner`."""
        by_slot = sorted(range(len(step)), key=lambda index: _slot(step[index]))
        ordered = [step[index] for index in by_slot]
        computed = self._decoder.step(self._batch(ordered))
        requests = [scheduled.request for scheduled in ordered if scheduled.samples]
        greedy = GreedyRows(computed.best.tolist(), computed.finite.tolist())
        sampled = iter(self._sampler.sample(computed.logits, requests, greedy) if requests else [])
        tokens: list[SampledToken | None] = [None] * len(step)
        for index in by_slot:
            if step[index].samples:
                tokens[index] = next(sampled)
        return StepDone(tokens)

    def _batch(self, step: Sequence[ScheduledRequest]) -> StepBatch:
        """The rows of the step. Requests of one adapter come together: its A is then read once for all of them."""
        counts = np.array([scheduled.num_tokens for scheduled in step])
        starts = np.array([scheduled.request.num_computed_tokens for scheduled in step])
        ends = np.cumsum(counts)
        blocks = -(-(starts + counts) // self._cache.block_size)
        block_tables = np.full((len(step), blocks.max()), -1, np.int32)
        tokens: list[int] = []
        for index, scheduled in enumerate(step):
            request = scheduled.request
            tokens += request.token_ids[starts[index] : starts[index] + counts[index]]
            found = request.block_ids[: blocks[index]]
            block_tables[index, : len(found)] = found
        return StepBatch(
            tokens=np.array(tokens, np.int32),
            positions=(np.arange(len(tokens)) + np.repeat(starts - ends + counts, counts)).astype(np.int32),
            slots=np.repeat(np.array([_slot(scheduled) for scheduled in step], np.int32), counts),
            sequences=np.repeat(np.arange(len(step), dtype=np.int32), counts),
            block_tables=block_tables,
            sampled_rows=(ends[[scheduled.samples for scheduled in step]] - 1).astype(np.int32),
        )


def _slot(scheduled: ScheduledRequest) -> int:
    return BASE_ROW if scheduled.slot is None else scheduled.slot


def compiled_cache(config: ModelConfig, num_blocks: int, block_size: int) -> CpuCache:
    """A cache that takes what the torch path's takes."""
    heads = (config.num_layers, num_blocks, config.num_kv_heads)
    return CpuCache(
        keys=reserve((*heads, config.head_dim, block_size), config.dtype),
        values=reserve((*heads, block_size, config.head_dim), config.dtype),
    )


def compiled_decoder(
    config: ModelConfig,
    weights: dict[str, StoredWeight],
    cache: CpuCache,
    pool: SlotPool,
    threads: int,
    *,
    int8: bool = False,
) -> CpuDecoder:
    """Pack the weights. They are taken out of `weights` one by one, so each is in memory once, packed or not.

    int8: linears, head and the embedding that is tied to it, in eight bits
    """
    packer = Packer(config.dtype, int8=int8)
    angles = torch.outer(torch.arange(config.max_model_len).float(), inverse_frequencies(config))
    embedding = None
    if not config.tie_word_embeddings:
        embedding = dense(weights.pop("model.embed_tokens.weight")).to(config.dtype)
    head = weights.pop("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
    return CpuDecoder(
        DecoderShape(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            norm_eps=config.rms_norm_eps,
            dtype=config.dtype,
        ),
        [_layer(weights, f"model.layers.{index}.", packer) for index in range(config.num_layers)],
        norm=dense(weights.pop("model.norm.weight")).float(),
        head=packer.pack(head),
        embedding=embedding,
        cosines=angles.cos(),
        sines=angles.sin(),
        cache=cache,
        lora=pool.weights,
        tables=pool.tables,
        threads=threads,
    )


def _layer(weights: dict[str, StoredWeight], prefix: str, packer: Packer) -> PackedLayer:
    linears = [linear for group in LINEAR_GROUPS.values() for linear in group]
    return PackedLayer(
        input_norm=dense(weights.pop(prefix + "input_layernorm.weight")).float(),
        post_attention_norm=dense(weights.pop(prefix + "post_attention_layernorm.weight")).float(),
        linears=tuple(packer.pack(weights.pop(f"{prefix}{linear}.weight")) for linear in linears),
    )
