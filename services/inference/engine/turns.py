"""Whose adapters hold slots: turns, taken in order of waiting, each a quantum long while others wait.

A turn is an adapter's right to a slot of the pool. It ends when its adapter has nothing to do or, once it has used its
quantum, when another adapter waits and finds no slot; then its requests are parked, with their keys and values. With A
adapters of one tenant over S slots nobody waits longer than ⌈A / S⌉ quanta of steps, and one more for the new ones
that may pass. Tenants share the slots max-min by weight: a turn passes to another tenant only while that tenant holds
none, or no more than the one it is taken from.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from services.inference.engine.fair_share import Weight
from services.inference.engine.interfaces import Lack, Slots
from services.inference.engine.request import AdapterVersion

NEW_ADAPTER_SHARE = 4
"""A new request's adapter may take over a turn after this fraction of its quantum: a first token is worth a swap, and
each request asks for one only once."""


@dataclass(frozen=True, slots=True)
class Demand:
    """An adapter with requests to run. is_new: one of them has not had its first token."""

    adapter: AdapterVersion
    tenant: str
    is_new: bool


@dataclass(slots=True)
class _Turn:
    """used: tokens that its longest request has had, at least one a step"""

    adapter: AdapterVersion
    tenant: str
    used: float = 0.0


class Turns:
    """Gives and takes turns, and holds the slots of one step.

    quantum: tokens of a request before its adapter's turn may pass to another
    passed, longest_wait: turns that passed from one adapter to another, and the most steps one waited for its turn
    """

    def __init__(self, adapters: Slots, quantum: int, weight: Weight) -> None:
        self._adapters = adapters
        self._quantum = quantum
        self._weight = weight
        self._turns: dict[str, _Turn] = {}
        self._waiting_since: dict[str, int] = {}
        self._slots: dict[str, int] = {}
        self._step = 0
        self.passed = 0
        self.longest_wait = 0

    def __contains__(self, digest: str) -> bool:
        """Whether the adapter has a slot in this step."""
        return digest in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def slot(self, digest: str) -> int:
        return self._slots[digest]

    def begin(self, demands: Mapping[str, Demand], most: int) -> None:
        """Settle who has a slot in the coming step, at most `most` adapters, and hold the slots until `end`."""
        assert not self._slots, "the last step has not ended"
        self._step += 1
        for digest in [digest for digest in self._turns if digest not in demands]:
            del self._turns[digest]
        self._waiting_since = {
            digest: self._waiting_since.get(digest, self._step) for digest in demands if digest not in self._turns
        }
        # Those that are in the pool first, so that no copy takes the place of one of them.
        for digest in sorted(self._turns, key=lambda digest: self._adapters.tier(demands[digest].adapter) != "GPU"):
            if self._acquire(digest, demands[digest]) is not None:
                del self._turns[digest]
                self._waiting_since[digest] = self._step
        held = Counter(turn.tenant for turn in self._turns.values())
        queues = self._queues(demands)
        while queues:
            key = min(queues, key=lambda key: self._order(queues[key][0], demands, held))
            if not self._give(queues[key][0], demands, held, most):
                del queues[key]  # those behind it need the same
                continue
            queues[key].popleft()
            if not queues[key]:
                del queues[key]

    def use(self, digest: str, tokens: int) -> None:
        """The longest request of an adapter in this step computes so many tokens."""
        turn = self._turns[digest]
        turn.used += max(1, tokens) / (self._weight(turn.tenant) * self._weight(turn.adapter.name))

    def end(self) -> None:
        """The step is over: its slots may be given to others."""
        for digest in self._slots:
            self._adapters.release(self._turns[digest].adapter)
        self._slots = {}

    def _queues(self, demands: Mapping[str, Demand]) -> dict[tuple[str, bool], deque[str]]:
        """Who waits, longest first: a queue for each tenant's new ones, and one for its others."""
        queues: dict[tuple[str, bool], deque[str]] = {}
        for digest in sorted(self._waiting_since, key=self._waiting_since.__getitem__):
            queues.setdefault((demands[digest].tenant, demands[digest].is_new), deque()).append(digest)
        return queues

    def _order(self, digest: str, demands: Mapping[str, Demand], held: Counter[str]) -> tuple[float, float]:
        """Least served tenant first, then whoever waits longest; a new one counts as having waited a quantum."""
        demand = demands[digest]
        waiting_since = self._waiting_since[digest] - (self._quantum if demand.is_new else 0)
        return held[demand.tenant] / self._weight(demand.tenant), waiting_since

    def _give(self, digest: str, demands: Mapping[str, Demand], held: Counter[str], most: int) -> bool:
        """Give the adapter a turn, or leave it waiting while its copy is under way or failed; False when there is
        neither room nor a turn that may pass to it."""
        demand = demands[digest]
        while (lack := self._acquire(digest, demand) if len(self._slots) < most else Lack.ROOM) is not None:
            if lack is Lack.ADAPTER:
                return True
            ended = self._ended(demand, held)
            if ended is None:
                return False
            self._pass_on(ended, held)
        self._turns[digest] = _Turn(demand.adapter, demand.tenant)
        held[demand.tenant] += 1
        self.longest_wait = max(self.longest_wait, self._step - self._waiting_since.pop(digest))
        return True

    def _ended(self, demand: Demand, held: Counter[str]) -> str | None:
        """The turn that should pass to this adapter: over its quantum, of the best served tenant, the most used."""
        needed = self._quantum / (NEW_ADAPTER_SHARE if demand.is_new else 1)
        wanted = (held[demand.tenant] + 1) / self._weight(demand.tenant)

        def served(turn: _Turn) -> float:
            return held[turn.tenant] / self._weight(turn.tenant)

        over = [
            digest
            for digest in self._slots
            if (turn := self._turns[digest]).used >= needed
            and (turn.tenant == demand.tenant or not held[demand.tenant] or wanted <= served(turn))
        ]
        return max(over, key=lambda digest: (served(self._turns[digest]), self._turns[digest].used), default=None)

    def _acquire(self, digest: str, demand: Demand) -> Lack | None:
        """Hold the adapter's slot for this step; what it lacks, when it has none."""
        slot = self._adapters.acquire(demand.adapter, follows=demand.is_new)
        if isinstance(slot, Lack):
            return slot
        self._slots[digest] = slot
        return None

    def _pass_on(self, digest: str, held: Counter[str]) -> None:
        turn = self._turns.pop(digest)
        self._adapters.release(turn.adapter)
        del self._slots[digest]
        held[turn.tenant] -= 1
        self._waiting_since[digest] = self._step
        self.passed += 1

    def check_integrity(self) -> None:
        """Raise AssertionError unless an adapter has a turn or waits for one, and each slot is held once."""
        assert not self._turns.keys() & self._waiting_since.keys(), "an adapter has a turn and waits for one"
        assert self._slots.keys() <= self._turns.keys(), "a slot is held without a turn"
        assert len(set(self._slots.values())) == len(self._slots), "two adapters hold one slot"
