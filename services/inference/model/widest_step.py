"""The step that needs the most memory: as many tokens as may be, of as many requests, with adapters of highest rank."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

from services.common.memory_plan import Room
from services.inference.adapters.slot_pool import SlotPool
from services.inference.engine.interfaces import Runner, ScheduledRequest
from services.inference.engine.request import Request, SamplingParams, StoppingParams
from services.inference.model.device_memory import DeviceMemory
from services.inference.model.lora import LINEAR_GROUPS


class EmptyAdapter:
    """An adapter that takes the pages of a rank and changes nothing."""

    def __init__(self, digest: str, rank: int) -> None:
        self.digest = digest
        self.ranks = {linear: rank for group in LINEAR_GROUPS.values() for linear in group}

    def module(self, _layer: int, _linear: str) -> None:
        return None

    def run(self, _layer: int) -> None:
        return None


def measured_activations(make_runner: Callable[[int], Runner], room: Room, pool: SlotPool, memory: DeviceMemory) -> int:
    """Bytes that the widest step holds at once beyond weights, pool and caches.

    make_runner: a runner over the pool with so many KV blocks
    """
    counts = token_counts(room)
    blocks = list(range(1, 1 - (-max(counts) // room.block_size)))
    runner = make_runner(1 + len(blocks))
    with _full_of_empty_adapters(pool, room) as slots:
        step = [
            ScheduledRequest(_request(index, count, blocks), count, slots[index % len(slots)])
            for index, count in enumerate(counts)
        ]
        return memory.peak_bytes(lambda: runner.launch(step).read())


def measured_graphs(
    make_runner: Callable[[int], Runner], make_eager: Callable[[int], Runner], memory: DeviceMemory
) -> int:
    """Bytes that a runner with graphs keeps beyond one without; of few KV blocks, on which graphs do not depend."""
    eager, whole = (memory.kept_bytes(functools.partial(make, 2)) for make in (make_eager, make_runner))
    return max(0, whole - eager)


def token_counts(room: Room) -> list[int]:
    """Tokens of each request in the widest step: prompts as long as may be, and one token for each of the others."""
    counts: list[int] = []
    left = room.max_num_batched_tokens
    for others in reversed(range(room.max_num_seqs)):
        counts.append(min(room.max_model_len, left - others))
        left -= counts[-1]
    return counts


def _request(index: int, count: int, blocks: list[int]) -> Request:
    """All of them write to the same blocks: what they answer is of no interest."""
    return Request(f"widest-{index}", [0] * count, SamplingParams(), StoppingParams(1), block_ids=blocks)


@contextlib.contextmanager
def _full_of_empty_adapters(pool: SlotPool, room: Room) -> Iterator[list[int]]:
    adapters = [EmptyAdapter(f"empty-{index}", room.max_lora_rank) for index in range(room.max_loras)]
    try:
        yield [pool.load(adapter).index for adapter in adapters]
    finally:
        for adapter in adapters:
            pool.evict(adapter.digest)
