"""A runner whose tokens are known beforehand, and adapters that come and fail when a test says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

from services.common.errors import DataLoss
from services.inference.engine.interfaces import Lack, SampledToken, ScheduledRequest, StepDone
from services.inference.engine.messages import ResidentAdapter
from services.inference.engine.request import AdapterVersion, StoppingParams

VOCAB = 53

T = TypeVar("T")


def adapter_version(name: str) -> AdapterVersion:
    return AdapterVersion(name, 1, f"digest-{name}", f"pack-{name}", 1)


def next_token(token_ids: Sequence[int], slot_digest: str) -> int:
    """What the scripted model says after these tokens: every one of them, their order and the adapter count."""
    state = sum(map(ord, slot_digest))
    for token in token_ids:
        state = (state * 31 + token + 7) % 1_000_003
    return state % VOCAB


def script(prompt: Sequence[int], adapter: AdapterVersion | None, stopping: StoppingParams) -> tuple[list[int], str]:
    """The whole answer and why it ends, worked out without an engine."""
    tokens: list[int] = []
    while len(tokens) < stopping.max_tokens:
        tokens.append(next_token([*prompt, *tokens], adapter.digest if adapter is not None else ""))
        if tokens[-1] in stopping.stop_token_ids and len(tokens) > stopping.min_tokens:
            return tokens, "STOP"
    return tokens, "LENGTH"


class ScriptedRunner:
    """Answers from what it finds in its own KV blocks, so a block lost, shared or stale changes the answer.

    fails: requests whose next sampled token is an error
    """

    def __init__(self, block_size: int, adapters: MemoryAdapters) -> None:
        self._block_size = block_size
        self._adapters = adapters
        self._cache: dict[int, int] = {}
        self.fails: set[str] = set()

    def launch(self, step: Sequence[ScheduledRequest]) -> StepDone:
        for scheduled in step:
            request, start = scheduled.request, scheduled.request.num_computed_tokens
            for position in range(start, start + scheduled.num_tokens):
                self._cache[self._row(request.block_ids, position)] = request.token_ids[position]
        return StepDone([self._sample(scheduled) if scheduled.samples else None for scheduled in step])

    def _row(self, block_ids: Sequence[int], position: int) -> int:
        return block_ids[position // self._block_size] * self._block_size + position % self._block_size

    def _sample(self, scheduled: ScheduledRequest) -> SampledToken:
        request = scheduled.request
        if request.request_id in self.fails:
            return SampledToken(error=DataLoss("SCRIPTED", "the script says so"))
        context = request.num_computed_tokens + scheduled.num_tokens
        seen = [self._cache[self._row(request.block_ids, position)] for position in range(context)]
        digest = self._adapters.slots[scheduled.slot] if scheduled.slot is not None else ""
        assert digest is not None, "a slot was taken from a scheduled request"
        return SampledToken(next_token(seen, digest))


class MemoryAdapters:
    """`engine.interfaces.Adapters` over dicts: `claims` places in host memory, `slots` in the pool.

    A claimed adapter that is not in memory stays on its way until `arrive` or `fail` is called for it; its copy into
    the pool is under way for as long as `copying` has it.
    """

    def __init__(self, claims: int, slots: int) -> None:
        self._max_claims = claims
        self.slots: list[str | None] = [None] * slots
        self.references: Counter[str] = Counter()
        self.claims: Counter[str] = Counter()
        self.in_memory: dict[str, None] = {}
        self.on_the_way: set[str] = set()
        self.copying: set[str] = set()
        self._failures: dict[str, Exception] = {}
        self.evictions = 0
        self.loads = 0
        self.transitions: dict[tuple[str, str], int] = {}

    def arrive(self, adapter: AdapterVersion) -> None:
        self.on_the_way.remove(adapter.digest)
        if self.claims[adapter.digest]:
            self.in_memory[adapter.digest] = None

    def fail(self, adapter: AdapterVersion) -> None:
        self.on_the_way.remove(adapter.digest)
        if self.claims[adapter.digest]:
            self._failures[adapter.digest] = DataLoss("SCRIPTED", adapter.name)

    def tier(self, adapter: AdapterVersion) -> str:
        if adapter.digest in self.slots:
            return "GPU"
        return "CPU" if adapter.digest in self.in_memory else "STORE"

    def try_claim(self, adapter: AdapterVersion) -> bool:
        digest = adapter.digest
        if digest not in self._kept():
            idle = (known for known in self.in_memory if not self.claims[known])
            if len(self._kept()) == self._max_claims and (victim := next(idle, None)) is not None:
                del self.in_memory[victim]
                self.slots = [None if slot == victim else slot for slot in self.slots]
            if len(self._kept()) == self._max_claims:
                return False
        self.claims[digest] += 1
        if digest not in self.in_memory:
            self.on_the_way.add(digest)
        return True

    def _kept(self) -> set[str]:
        return {*self.in_memory, *(digest for digest, count in self.claims.items() if count)}

    def unclaim(self, adapter: AdapterVersion) -> None:
        assert self.claims[adapter.digest] > 0
        self.claims[adapter.digest] -= 1
        if not self.claims[adapter.digest]:
            self._failures.pop(adapter.digest, None)

    def is_ready(self, adapter: AdapterVersion) -> bool:
        return adapter.digest in self.in_memory

    def failure(self, adapter: AdapterVersion) -> Exception | None:
        return self._failures.get(adapter.digest)

    def acquire(self, adapter: AdapterVersion, **_: bool) -> int | Lack:
        digest = adapter.digest
        assert digest in self.in_memory and self.claims[digest], "acquired without a claim, or before it was ready"
        if digest not in self.slots:
            free = [index for index, held in enumerate(self.slots) if held is None or not self._is_kept(held)]
            if not free:
                return Lack.ROOM
            self.evictions += self.slots[free[0]] is not None
            self.loads += 1
            self.slots[free[0]] = digest
        if digest in self.copying:
            return Lack.ADAPTER
        self.references[digest] += 1
        return self.slots.index(digest)

    def _is_kept(self, digest: str) -> bool:
        return bool(self.references[digest]) or digest in self.copying

    def release(self, adapter: AdapterVersion) -> None:
        assert self.references[adapter.digest] > 0
        self.references[adapter.digest] -= 1

    def prefetch(self, adapter: AdapterVersion) -> None:
        if self.try_claim(adapter):
            self.unclaim(adapter)

    def drop(self, name: str, version: int) -> None:
        """Nothing is deleted here."""

    def warm(self, adapter: AdapterVersion) -> None:
        if None in self.slots:
            self.acquire(adapter)
            self.release(adapter)

    def pin(self, adapter: AdapterVersion) -> None:
        """What is pinned is the manager's to know; so it is with drains."""

    def unpin(self, adapter: AdapterVersion) -> None: ...

    def drain(self, name: str, version: int | None) -> None: ...

    def end_drain(self, name: str, version: int | None, *, evict: bool) -> None: ...

    def next_deadline(self) -> float | None:
        return None

    def poll(self) -> None:
        """What arrived is taken in at once."""

    def list(self, waiting: Mapping[str, int]) -> list[ResidentAdapter]:  # noqa: ARG002
        return []

    def close(self) -> None:
        """Nothing of its own runs."""

    def check_integrity(self) -> None:
        assert len(self._kept()) <= self._max_claims
        held = {digest for digest, count in self.references.items() if count}
        assert held <= set(self.slots)
        assert held <= {digest for digest, count in self.claims.items() if count}
