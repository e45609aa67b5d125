"""Runs one engine step: scheduled requests to tensors, through the decoder, to sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels import BASE_ROW, ActiveSet, LoraBatch
from services.inference.adapters.slot_pool import SlotPool
from services.inference.engine.interfaces import SampledToken, ScheduledRequest
from services.inference.model.attention import AttentionBatch, KVCache, PrefillSequence
from services.inference.model.decoder import Decoder, ForwardBatch
from services.inference.model.lora import LoraLayer
from services.inference.model.sampler import Sampler


class ModelRunner:
    """The torch path: correct everywhere, and the reference for faster ones behind the same interface."""

    def __init__(self, decoder: Decoder, cache: KVCache, pool: SlotPool, sampler: Sampler) -> None:
        self._decoder = decoder
        self._cache = cache
        self._pool = pool
        self._sampler = sampler
        self._active = ActiveSet.build((), pool.tables)
        self._active_contents: tuple[tuple[int, int], ...] = ()

    @torch.inference_mode()
    def run(self, step: Sequence[ScheduledRequest]) -> list[SampledToken | None]:
        """Compute one step; an entry per request, None for one that does not sample in it."""
        lora = LoraBatch(row_slots=_row_slots(step), active=self._active_set(step))
        logits = self._decoder.forward(
            self._forward_batch(step), self._cache, lambda layer: LoraLayer(self._pool.weights[layer], lora)
        )
        sampling = [scheduled.request for scheduled in step if scheduled.samples]
        sampled = iter(self._sampler.sample(logits, sampling) if sampling else [])
        return [next(sampled) if scheduled.samples else None for scheduled in step]

    def _forward_batch(self, step: Sequence[ScheduledRequest]) -> ForwardBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        sampled_rows: list[int] = []
        for scheduled in step:
            start = scheduled.request.num_computed_tokens
            end = start + scheduled.num_tokens
            token_ids += scheduled.request.token_ids[start:end]
            positions += range(start, end)
            if scheduled.samples:
                sampled_rows.append(len(token_ids) - 1)
        return ForwardBatch(
            torch.tensor(token_ids),
            torch.tensor(positions),
            self._attention_batch(step),
            torch.tensor(sampled_rows).long(),
        )

    def _attention_batch(self, step: Sequence[ScheduledRequest]) -> AttentionBatch:
        new_rows: list[Tensor] = []
        prefill: list[PrefillSequence] = []
        decode_rows: list[int] = []
        contexts: list[Tensor] = []
        row = 0
        for scheduled in step:
            context = scheduled.request.num_computed_tokens + scheduled.num_tokens
            cache_rows = self._cache_rows(scheduled.request.block_ids, context)
            new_rows.append(cache_rows[context - scheduled.num_tokens :])
            if scheduled.num_tokens == 1:
                decode_rows.append(row)
                contexts.append(cache_rows)
            else:
                prefill.append(PrefillSequence(row, row + scheduled.num_tokens, cache_rows))
            row += scheduled.num_tokens
        padded = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True, padding_value=-1) if contexts else _NO_ROWS
        padding = padded < 0
        return AttentionBatch(
            new_rows=torch.cat(new_rows),
            prefill=tuple(prefill),
            decode_rows=torch.tensor(decode_rows, dtype=torch.int64),
            decode_cache_rows=padded.masked_fill(padding, 0),
            decode_padding=padding,
        )

    def _cache_rows(self, block_ids: Sequence[int], context: int) -> Tensor:
        size = self._cache.block_size
        starts = torch.tensor(block_ids, dtype=torch.int64) * size
        return (starts[:, None] + torch.arange(size)).flatten()[:context]

    def _active_set(self, step: Sequence[ScheduledRequest]) -> ActiveSet:
        """The slots of this step; rebuilt only when they, or what lies in them, changed since the last one."""
        slots = sorted({scheduled.slot for scheduled in step if scheduled.slot is not None})
        contents = tuple((slot, self._pool.generation(slot)) for slot in slots)
        if contents != self._active_contents:
            self._active = ActiveSet.build(slots, self._pool.tables)
            self._active_contents = contents
        return self._active


_NO_ROWS = torch.zeros((0, 0), dtype=torch.int64)


def _row_slots(step: Sequence[ScheduledRequest]) -> Tensor:
    """[rows] int32: the slot of every row, `BASE_ROW` where there is none."""
    slots = torch.tensor([BASE_ROW if s.slot is None else s.slot for s in step], dtype=torch.int32)
    return slots.repeat_interleave(torch.tensor([scheduled.num_tokens for scheduled in step]))
