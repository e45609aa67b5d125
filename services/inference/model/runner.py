"""Runs one engine step: scheduled requests to tensors, through the decoder, to sampled tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_kernels import BASE_ROW, ActiveSet, LoraBatch
from services.inference.adapters.slot_pool import SlotPool
from services.inference.engine.interfaces import SampledToken, ScheduledRequest, StepDone
from services.inference.model.attention import AttentionBatch, KVCache, PrefillSequence
from services.inference.model.decoder import Decoder, ForwardBatch
from services.inference.model.lora import LoraLayer
from services.inference.model.sampler import Sampler
from services.inference.parallel.collectives import ALONE, Collectives

Indices = NDArray[np.int64]


class ActiveSlots:
    """The slots of a step; the set is rebuilt only when they, or what lies in them, changed since the last one.

    spares: keeps slots in it that take part no more, up to as many as do, as where rebuilding copies weights
    """

    def __init__(self, pool: SlotPool, *, spares: bool = False) -> None:
        self._pool = pool
        self._spares = spares
        self._none = self._active = ActiveSet.build((), pool.tables)
        self._contents: dict[int, int] = {}

    def of(self, slots: Collection[int]) -> ActiveSet:
        """slots: each once"""
        if not slots:
            return self._none
        contents = {slot: self._pool.generation(slot) for slot in sorted(slots)}
        if contents != self._contents and not (self._spares and self._holds(contents)):
            self._active = ActiveSet.build(list(contents), self._pool.tables)
            self._contents = contents
        return self._active

    def _holds(self, contents: dict[int, int]) -> bool:
        """Whether the set as it is has these slots, and not too many others."""
        unchanged = all(self._pool.generation(slot) == held for slot, held in self._contents.items())
        return unchanged and contents.items() <= self._contents.items() and len(self._contents) <= 2 * len(contents)


class ModelRunner:
    """The torch path: correct everywhere, and the reference for faster ones behind the same interface.

    ranks: those that share the model; `decoder`, `cache` and `pool` are this one's part of it
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, pool: SlotPool, sampler: Sampler, ranks: Collectives = ALONE
    ) -> None:
        self._ranks = ranks
        self._decoder = decoder
        self._cache = cache
        self._pool = pool
        self._sampler = sampler
        self._active = ActiveSlots(pool, spares=True)

    @torch.inference_mode()
    def launch(self, step: Sequence[ScheduledRequest]) -> StepDone:
        """Compute one step. See `Runner`."""
        logits = self.forward(self._forward_batch(step), _row_slots(step))
        sampling = [scheduled.request for scheduled in step if scheduled.samples]
        sampled = self._sampler.sample(logits, sampling) if sampling else []
        return StepDone(per_request([scheduled.samples for scheduled in step], sampled))

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, row_slots: Tensor) -> Tensor:
        """Logits [n, vocab] of the rows that are sampled; row_slots: as `LoraBatch` has it."""
        shard = self._ranks.shard
        active = self._active.of(set(row_slots.tolist()) - {BASE_ROW})
        lora = LoraBatch(row_slots, active, sum_shrunk=self._ranks.sum if shard.fully_sharded else None)
        return self._decoder.forward(
            batch, self._cache, lambda layer: LoraLayer(self._pool.weights[layer], lora, shard.rank)
        )

    def _forward_batch(self, step: Sequence[ScheduledRequest]) -> ForwardBatch:
        counts = np.array([scheduled.num_tokens for scheduled in step])
        starts = np.array([scheduled.request.num_computed_tokens for scheduled in step])
        ends = counts.cumsum()
        requests = np.repeat(np.arange(len(step)), counts)
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        token_ids = [
            token
            for scheduled, start, count in zip(step, starts.tolist(), counts.tolist(), strict=True)
            for token in scheduled.request.token_ids[start : start + count]
        ]
        contexts = starts + counts
        cache_rows = self._cache_rows(step, contexts)
        return ForwardBatch(
            torch.tensor(token_ids),
            torch.from_numpy(positions),
            _attention_batch(counts, contexts, cache_rows, cache_rows[requests, positions]),
            torch.from_numpy(ends[[scheduled.samples for scheduled in step]] - 1),
        )

    def _cache_rows(self, step: Sequence[ScheduledRequest], contexts: Indices) -> Indices:
        """[requests, longest]: where in the cache the tokens of each context lie, its first one repeated at the end."""
        size, longest = self._cache.block_size, int(contexts.max())
        blocks = np.zeros((len(step), -(-longest // size)), dtype=np.int64)
        for row, scheduled in zip(blocks, step, strict=True):
            held = scheduled.request.block_ids[: len(row)]
            row[: len(held)] = held
        rows = (blocks[:, :, None] * size + np.arange(size)).reshape(len(step), -1)[:, :longest]
        return np.where(np.arange(longest) < contexts[:, None], rows, rows[:, :1])


def _attention_batch(counts: Indices, contexts: Indices, cache_rows: Indices, new_rows: Indices) -> AttentionBatch:
    """Requests with one new token attend together, the others each alone.

    counts, contexts: [requests], new tokens and all tokens; cache_rows: [requests, longest]; new_rows: [rows]
    """
    first_rows, alone = counts.cumsum() - counts, counts == 1
    longest = int(contexts[alone].max(initial=0))
    return AttentionBatch(
        new_rows=torch.from_numpy(new_rows),
        prefill=tuple(
            PrefillSequence(first, first + count, torch.from_numpy(rows[:context]))
            for first, count, context, rows in zip(
                first_rows.tolist(), counts.tolist(), contexts.tolist(), cache_rows, strict=True
            )
            if count > 1
        ),
        decode_rows=torch.from_numpy(first_rows[alone]),
        decode_cache_rows=torch.from_numpy(cache_rows[alone, :longest]),
        decode_visible=torch.from_numpy(np.arange(longest) < contexts[alone, None])[:, None, None],
    )


def _row_slots(step: Sequence[ScheduledRequest]) -> Tensor:
    """[rows] int32: the slot of every row, `BASE_ROW` where there is none."""
    slots = torch.tensor([BASE_ROW if s.slot is None else s.slot for s in step], dtype=torch.int32)
    return slots.repeat_interleave(torch.tensor([scheduled.num_tokens for scheduled in step]))


def per_request(samples: Sequence[bool], tokens: Sequence[SampledToken]) -> list[SampledToken | None]:
    """The tokens of a step by its requests, None for each that does not sample in it."""
    sampled = iter(tokens)
    return [next(sampled) if each else None for each in samples]
