"""Fair shares: of tokens over time by virtual counters, of seats at one moment by max-min."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

PROMPT_TOKEN_COST = 1.0
OUTPUT_TOKEN_COST = 2.0
"""What a token charges: one of an answer reads the weights again, one of a prompt shares them with its neighbours. The
weights of the paper below; a step on two cores agrees (0.7 ms a prompt token, about 2 ms a decoded one)."""

Weight = Callable[[str], float]


class VirtualCounters:
    """Service received, divided by weight; whoever has received least goes first.

    Source: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024). A key that comes back after a pause
    starts no lower than the least of those that stayed, so that no one saves up service by being away; its bound on
    how far two busy keys may drift apart is one request's cost each.
    """

    def __init__(self, weight: Weight) -> None:
        self._weight = weight
        self._counters: dict[str, float] = {}
        self._active: frozenset[str] = frozenset()

    def __getitem__(self, key: str) -> float:
        return self._counters.get(key, 0.0)

    def set_active(self, keys: Collection[str]) -> None:
        """Who has something to do from now on."""
        now = frozenset(keys)
        if now == self._active:
            return
        stayed = now & self._active
        floor = min((self._counters[key] for key in stayed or self._active), default=0.0)
        # A counter at or below the floor says nothing that coming back would not, so it is forgotten.
        self._counters = {key: count for key, count in self._counters.items() if key in now or count > floor}
        for key in now - stayed:
            self._counters[key] = max(floor, self._counters.get(key, 0.0))
        self._active = now

    def charge(self, key: str, cost: float) -> None:
        self._counters[key] += cost / self._weight(key)


def max_min(seats: int, demands: Mapping[str, int], weight: Weight, first: Callable[[str], float]) -> dict[str, int]:
    """Share out whole seats: nobody gets more than asked for, and nobody could get one more without taking it from
    someone who has no more by weight. `first(key)`, lowest first, breaks ties.
    """
    shares = dict.fromkeys(demands, 0)
    hungry = sorted((key for key in demands if demands[key]), key=first)
    while seats and hungry:
        key = min(hungry, key=lambda key: (shares[key] + 1) / weight(key))
        shares[key] += 1
        seats -= 1
        if shares[key] == demands[key]:
            hungry.remove(key)
    return shares
