"""Runs engine steps on a GPU: decode in CUDA graphs by bucket, prefill eager, and the host waits once, for tokens; the
next step is launched before that, and finds them on the device.

With the graphs off, every line of it runs on a CPU too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attention_kernels import PagedRows, cut_into_tiles, paged_attention, tile_tokens
from lora_kernels import BASE_ROW, ActiveSet, LoraBatch, WorkList
from services.common.memory_plan import decode_buckets
from services.inference.adapters.slot_pool import SlotPool, pages_for
from services.inference.engine.interfaces import LaunchedStep, SampledToken, ScheduledRequest, StepDone
from services.inference.engine.request import PENDING, Request
from services.inference.model.attention import KVCache
from services.inference.model.decoder import Decoder, ForwardBatch
from services.inference.model.device_ints import DeviceInts
from services.inference.model.device_sampler import Choices, DeviceSampler
from services.inference.model.lora import LoraLayer
from services.inference.model.runner import ActiveSlots, per_request
from services.inference.model.sampler import Sampler
from services.inference.parallel.collectives import ALONE, Collectives

log = logging.getLogger(__name__)


class StepLogits(NamedTuple):
    """Of the rows asked for. greedy: [2, n] int64, the largest logit's token, and 1 where all logits are finite"""

    logits: Tensor
    greedy: Tensor


Forward = Callable[[], StepLogits]
Capture = Callable[[Forward], Forward]
"""Records a forward pass; what it returns replays it, into the same memory each time."""


class Share(NamedTuple):
    """A request's part of a step, as far as a forward pass needs it: `token_ids` from place `start` on, where ~row is
    what the step before says of that row of its own."""

    token_ids: list[int]
    start: int
    block_ids: list[int]
    slot: int | None
    samples: bool


@dataclass(frozen=True, eq=False, slots=True)
class StepBuffers:
    """A step's integers and its work list; for a decode bucket they are fixed, and padded with rows of token 0 at
    position 0 in the null block, which are all alike."""

    ints: DeviceInts
    work: WorkList
    parts: tuple[PagedRows, ...]


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Rows that attend over block tables, wherever they are.

    new_rows: [rows] int64, where in the cache each row's key and value go
    parts: the rows, each in one of them
    """

    new_rows: Tensor
    parts: tuple[PagedRows, ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, layer: int) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        keys.index_copy_(0, self.new_rows, k)
        values.index_copy_(0, self.new_rows, v)
        out = torch.empty_like(q)
        for part in self.parts:
            paged_attention(out, q, keys, values, part)
        return out.flatten(1)


@dataclass(frozen=True, eq=False, slots=True)
class GpuStep:
    """A step whose tokens are all chosen on the device, where the next one finds them: of several ranks on the first
    one's alone, so that the others wait to be told.

    samples: which of its requests have one
    """

    samples: Sequence[bool]
    choices: Choices
    runs_ahead: bool

    def read(self) -> list[SampledToken | None]:
        return per_request(self.samples, self.choices.read())


class GpuRunner:
    """Decode is padded to a bucket; a step with any prompt in it has buffers of its own.

    max_num_seqs: most requests of a decode step
    capture: None runs decode eagerly too
    capture_failures: graphs that could not be had; those steps run eagerly
    ranks: those that share the model; `decoder`, `cache` and `pool` are this one's part of it. Their collectives are in
        its graphs
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        pool: SlotPool,
        sampler: Sampler,
        *,
        max_num_seqs: int,
        capture: Capture | None,
        ranks: Collectives = ALONE,
    ) -> None:
        self._ranks = ranks
        self._decoder, self._cache, self._pool = decoder, cache, pool
        self._sampler = DeviceSampler(sampler, cache.keys.device)
        self._said: tuple[dict[Request, int], Tensor] = {}, torch.empty(0)  # rows of the step before, their tokens
        self._device = cache.keys.device
        self._table_blocks = -(-decoder.config.max_model_len // cache.block_size)
        self._active = ActiveSlots(pool)
        self._buckets = {rows: self._decode_buffers(rows) for rows in decode_buckets(max_num_seqs)}
        self._graphs: dict[tuple[int, bool], Forward] = {}
        self.capture_failures = 0
        if capture is not None:
            self._capture(capture)

    @torch.inference_mode()
    def launch(self, step: Sequence[ScheduledRequest]) -> LaunchedStep:
        """Begin one step. See `Runner`."""
        computed = self.forward([self._share(scheduled) for scheduled in step])
        samples = [scheduled.samples for scheduled in step]
        requests = [scheduled.request for scheduled in step if scheduled.samples]
        choices = self._sampler.choose(computed.logits, computed.greedy, requests)
        self._said = {request: row for row, request in enumerate(requests)}, choices.tokens
        if any(map(self._sampler.leaves_to_host, requests)):
            return StepDone(per_request(samples, self._sampler.read(computed.logits, choices)))
        return GpuStep(samples, choices, runs_ahead=self._ranks.shard.size == 1)

    def _share(self, scheduled: ScheduledRequest) -> Share:
        request, start = scheduled.request, scheduled.request.num_computed_tokens
        token_ids = request.token_ids[start : start + scheduled.num_tokens]
        if token_ids[-1] == PENDING:
            token_ids[-1] = ~self._said[0][request]
        return Share(token_ids, start, request.block_ids, scheduled.slot, scheduled.samples)

    @torch.inference_mode()
    def forward(self, step: Sequence[Share]) -> StepLogits:
        """Of several ranks all must be here, with the same step; rank 0 has the logits, the others a part of them."""
        decodes = all(share.samples and len(share.token_ids) == 1 for share in step)
        return self._decode(step) if decodes and len(step) <= max(self._buckets) else self._prefill(step)

    def _decode(self, step: Sequence[Share]) -> StepLogits:
        bucket = next(rows for rows in self._buckets if rows >= len(step))
        buffers, active = self._buckets[bucket], self._active.of(_slots(step))
        self._send(buffers, step, active)
        graph = self._graphs.get((bucket, bool(active.slots)))
        if graph is None:
            return self._forward(buffers, active)
        self._pool.wait(active.slots)
        return graph()

    def _prefill(self, step: Sequence[Share]) -> StepLogits:
        """Any step, in buffers of its own: requests with one row decode as always, the others in tiles."""
        ends = np.cumsum([len(share.token_ids) for share in step]).tolist()
        spans = [(index, end - len(step[index].token_ids), end) for index, end in enumerate(ends)]
        tokens = tile_tokens(self._decoder.config.num_heads, self._decoder.config.num_kv_heads)
        tiles = {
            tokens: cut_into_tiles([span for span in spans if span[2] - span[1] > 1], tokens),
            1: cut_into_tiles([span for span in spans if span[2] - span[1] == 1], 1),
        }
        sampled = [end - 1 for end, share in zip(ends, step, strict=True) if share.samples]
        buffers = self._buffers(ends[-1], len(step), tiles, sampled)
        active = self._active.of(_slots(step))
        self._send(buffers, step, active)
        return self._forward(buffers, active)

    def _forward(self, buffers: StepBuffers, active: ActiveSet) -> StepLogits:
        work = buffers.work
        if active.slots and self._device.type == "cuda":
            from lora_kernels.triton_work_list import build_work_list

            build_work_list(work)
        shard = self._ranks.shard
        sum_shrunk = self._ranks.sum if shard.fully_sharded else None
        lora = LoraBatch(work.packed[: work.rows], active, work, sum_shrunk)
        ints = buffers.ints.device
        attention = PagedAttention(ints["new_rows"].long(), buffers.parts)
        batch = ForwardBatch(ints["token_ids"], ints["positions"], attention, ints["sampled"])

        def adapters(layer: int) -> LoraLayer:
            self._pool.wait(active.slots, layer)
            return LoraLayer(self._pool.weights[layer], lora, shard.rank)

        logits = self._decoder.forward(batch, self._cache, adapters)
        return StepLogits(logits, torch.stack([logits.argmax(-1), logits.isfinite().all(-1).long()]))

    def _decode_buffers(self, rows: int) -> StepBuffers:
        one_each = cut_into_tiles([(row, row, row + 1) for row in range(rows)], 1)
        return self._buffers(rows, rows, {1: one_each}, list(range(rows)))

    def _buffers(self, rows: int, sequences: int, tiles: dict[int, Tensor], sampled: list[int]) -> StepBuffers:
        """tiles: by the rows that one may have"""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("token_ids", "positions", "new_rows"), (rows,))
        shapes |= {"block_tables": (sequences, self._table_blocks), "sampled": (len(sampled),)}
        shapes |= {f"tiles_{tokens}": tuple(cut.shape) for tokens, cut in tiles.items()}
        ints = DeviceInts(shapes, self._device)
        ints.host["sampled"][:] = sampled
        for tokens, cut in tiles.items():
            ints.host[f"tiles_{tokens}"][:] = cut.numpy()
        tables, positions, size = ints.device["block_tables"], ints.device["positions"], self._cache.block_size
        parts = tuple(PagedRows(tables, positions, ints.device[f"tiles_{tokens}"], tokens, size) for tokens in tiles)
        pages = pages_for(self._pool.max_lora_rank)
        work = WorkList.allocate(rows, self._pool.num_slots, pages, self._device)
        return StepBuffers(ints, work, parts)

    def _send(self, buffers: StepBuffers, step: Sequence[Share], active: ActiveSet) -> None:
        """Fill the buffers with a step, padding behind it, and send it up: one copy, and one for adapters."""
        here, size = buffers.ints.host, self._cache.block_size
        for name in ("token_ids", "positions", "new_rows"):
            here[name][:] = 0
        row, slots = 0, list[int]()
        for index, (token_ids, start, blocks, slot, _) in enumerate(step):
            count = len(token_ids)
            here["block_tables"][index, : len(blocks)] = blocks
            positions = np.arange(start, start + count)
            rows = slice(row, row + count)
            here["token_ids"][rows] = token_ids
            here["positions"][rows] = positions
            here["new_rows"][rows] = here["block_tables"][index, positions // size] * size + positions % size
            slots += [BASE_ROW if slot is None else slot] * count
            row += count
        here["block_tables"][len(step) :, 0] = 0
        buffers.ints.send()
        if here["token_ids"].min() < 0:
            there, said = buffers.ints.device["token_ids"], self._said[1]
            there.copy_(torch.where(there < 0, said.index_select(0, (~there).clamp(min=0)), there))
        fits = buffers.work.stage(slots, active.pages_of_slot)
        assert fits, "a work list has room for every step of its rows"

    def _capture(self, capture: Capture) -> None:
        """A graph for each bucket with adapters, whichever they are, and one without. One that fails runs eagerly."""
        some, none = (ActiveSet.build(slots, self._pool.tables) for slots in ((0,), ()))
        for rows, buffers in reversed(self._buckets.items()):  # the largest first: the others fit in its memory
            buffers.ints.send()
            buffers.work.stage([], none.pages_of_slot)
            for active in (some, none):
                try:
                    with torch.inference_mode():
                        graph = capture(functools.partial(self._forward, buffers, active))
                except RuntimeError as error:
                    if not self.capture_failures:
                        log.warning("decode of %d requests runs without a CUDA graph, slower: %s", rows, error)
                    self.capture_failures += 1
                else:
                    self._graphs[rows, bool(active.slots)] = graph
        log.info("%d CUDA graphs captured, %d failed", len(self._graphs), self.capture_failures)


def _slots(step: Sequence[Share]) -> set[int]:
    return {share.slot for share in step if share.slot is not None}


def cuda_graphs() -> Capture:
    """Captures into CUDA graphs that share their memory: one runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(forward: Forward) -> Forward:
        # Once before, on a stream of its own: kernels are compiled and workspaces made outside of the graph.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            forward()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog, another thread, may ask the device something meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            computed = forward()

        def replay() -> StepLogits:
            graph.replay()
            return computed

        return replay

    return capture
