"""Lanes that do their work when they are told to, as a GPU's streams do theirs beside the host."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Point:
    """An event. waits: where those who go on after it are written down"""

    name: str
    waits: list[str]
    reached: bool = False

    def query(self) -> bool:
        return self.reached

    def wait(self) -> None:
        self.waits.append(self.name)


@dataclass
class HeldLanes:
    """done: what was done, in its order; waits: what the steps' stream was told to wait for

    faults: what the next work of a lane, `copy` or `scatter`, is refused with
    """

    done: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    faults: dict[str, Exception] = field(default_factory=dict)
    _lanes: dict[str, deque[tuple[Callable[[], None], tuple[Point, ...], Point]]] = field(
        default_factory=lambda: {"copy": deque(), "scatter": deque()}
    )
    _count: int = 0

    def steps(self) -> Point:
        return Point("steps", self.waits, reached=True)

    def copy(self, work: Callable[[], None], *after: Point) -> Point:
        return self._put("copy", work, after)

    def scatter(self, work: Callable[[], None], *after: Point) -> Point:
        return self._put("scatter", work, after)

    def _put(self, lane: str, work: Callable[[], None], after: tuple[Point, ...]) -> Point:
        if (fault := self.faults.pop(lane, None)) is not None:
            raise fault
        self._count += 1
        point = Point(f"{lane} {self._count}", self.waits)
        self._lanes[lane].append((work, after, point))
        return point

    def work(self, most: int = 1 << 30, order: random.Random | None = None) -> None:
        """Do so much of it, each lane in its order and what comes after something else not before that."""
        for _ in range(most):
            able = [lane for lane, work in self._lanes.items() if work and all(point.reached for point in work[0][1])]
            if not able:
                assert not any(self._lanes.values()), "lanes wait for each other"
                return
            work, _, point = self._lanes[order.choice(able) if order else able[0]].popleft()
            work()
            point.reached = True
            self.done.append(point.name)
