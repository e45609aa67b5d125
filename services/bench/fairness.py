"""The scheduler alone, without a model: `make bench-fairness`, or `python -m services.bench.fairness [--steps N]`.

Three tenants always have more to do than there are slots and seats, and one of them floods one adapter. Shown over many
steps: how long an adapter waited for its turn at most, beside the bound that `engine.turns` promises, and which share
of the tokens each tenant received, beside its weight. No clock is involved, so the result is the same on every machine.
A JSON line goes to --out, a plot to --plot; exits with 1 when the bound is broken or a share is off.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import Counter, OrderedDict
from pathlib import Path

from rich.console import Console

from services.bench.load.plots import plot
from services.bench.results import Figure, Result, print_table, write_lines
from services.inference.config import SchedulerConfig
from services.inference.engine.interfaces import Lack
from services.inference.engine.request import (
    PENDING,
    AdapterVersion,
    Request,
    RequestStatus,
    SamplingParams,
    StoppingParams,
)
from services.inference.engine.scheduler import Scheduler

SLOTS, QUANTUM = 8, 32
WEIGHTS = {"gold": 2.0, "silver": 1.0, "flood": 1.0}
ADAPTERS = {"gold": 12, "silver": 12, "flood": 1}
BACKLOG = {"gold": 2, "silver": 2, "flood": 64}
"""Requests that each adapter always has."""

SHARE_TOLERANCE = 0.1
"""How far a tenant's share of the answers' tokens may be from its weight's: whole seats do not divide finer."""


class DictSlots:
    """`engine.interfaces.Slots` over a dict: the pool without its memory."""

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots))
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._held: set[str] = set()

    def tier(self, adapter: AdapterVersion) -> str:
        return "GPU" if adapter.digest in self._slots else "CPU"

    def acquire(self, adapter: AdapterVersion, **_: bool) -> int | Lack:
        if adapter.digest not in self._slots:
            idle = next((digest for digest in self._slots if digest not in self._held), None)
            if not self._free and idle is None:
                return Lack.ROOM
            self._slots[adapter.digest] = self._free.pop() if self._free else self._slots.pop(idle or "")
        self._slots.move_to_end(adapter.digest)
        self._held.add(adapter.digest)
        return self._slots[adapter.digest]

    def release(self, adapter: AdapterVersion) -> None:
        self._held.remove(adapter.digest)


class Simulation:
    """A closed loop: each adapter keeps its backlog, whatever is served.

    tokens: tokens of answers by tenant
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        config = SchedulerConfig(
            max_model_len=256,
            num_blocks=4096,
            max_num_seqs=16,
            max_num_batched_tokens=128,
            turn_tokens=QUANTUM,
            weights=WEIGHTS,
        )
        self.scheduler = Scheduler(config, DictSlots(SLOTS))
        self.tokens: Counter[str] = Counter()
        self._sent = 0
        for tenant, count in ADAPTERS.items():
            for number in range(count):
                name = f"{tenant}/{number}"
                version = AdapterVersion(name, 1, f"digest-{name}", f"pack-{name}", 1)
                for _ in range(BACKLOG[tenant]):
                    self._send(version)

    def step(self) -> None:
        """Schedule, and do to the requests what the engine does after a run."""
        step = self.scheduler.schedule()
        self.scheduler.launched(step)
        for request in [scheduled.request for scheduled in step]:
            self.scheduler.kv.remember(request, request.num_computed_tokens)
            if request.token_ids[-1] == PENDING:
                request.token_ids[-1] = self._random.randrange(1000)
                self.tokens[request.tenant] += 1
                if request.num_output_tokens == request.stopping.max_tokens:
                    self.scheduler.finish(request, RequestStatus.FINISHED_LENGTH)
                    assert request.adapter is not None
                    self._send(request.adapter)
        self.scheduler.took(step, 0.0)

    def _send(self, adapter: AdapterVersion) -> None:
        self._sent += 1
        prompt = [self._random.randrange(1000) for _ in range(self._random.randint(4, 64))]
        stopping = StoppingParams(self._random.randint(8, 128))
        request = Request(f"r{self._sent}", prompt, SamplingParams(), stopping, adapter, arrival_time=float(self._sent))
        self.scheduler.add(request)
        self.scheduler.adapter_arrived(request)


def wait_bound() -> int:
    """Steps an adapter of the worst placed tenant may wait: a round of its adapters over its slots, each a quantum
    by weight, and a quantum for new ones that may pass."""
    weights = sum(WEIGHTS.values())
    rounds = {
        tenant: math.ceil(ADAPTERS[tenant] / max(1, int(SLOTS * WEIGHTS[tenant] / weights))) * WEIGHTS[tenant]
        for tenant in WEIGHTS
    }
    return int((max(rounds.values()) + 1) * QUANTUM)


def run(steps: int, seed: int, plot_path: Path | None) -> Result:
    """Simulate, and compare with what is promised."""
    simulation = Simulation(seed)
    shares: dict[str, list[tuple[float, float]]] = {tenant: [] for tenant in WEIGHTS}
    waits: list[tuple[float, float]] = []
    window: Counter[str] = Counter()
    for number in range(1, steps + 1):
        simulation.step()
        if number % max(1, steps // 50) == 0:
            served = simulation.tokens - window
            window = Counter(simulation.tokens)
            for tenant in WEIGHTS:
                shares[tenant].append((number, served[tenant] / served.total()))
            waits.append((number, simulation.scheduler.turns.longest_wait))
    total = simulation.tokens.total()
    bound = wait_bound()
    if plot_path is not None:
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {
            "share of tokens": shares,
            "longest wait for a turn (steps)": {"seen": waits, "bound": [(number, bound) for number, _ in waits]},
        }
        plot(plot_path, "steps", panels)
    received = {tenant: simulation.tokens[tenant] / total for tenant in WEIGHTS}
    return Result(
        "fairness",
        {"steps": steps, "seed": seed, "slots": SLOTS, "quantum": QUANTUM, "adapters": ADAPTERS, "weights": WEIGHTS},
        {"shares": received, "turns_passed": simulation.scheduler.turns.passed},
        figures(received, simulation.scheduler.turns.longest_wait, bound),
    )


def figures(received: dict[str, float], longest_wait: int, bound: int) -> list[Figure]:
    """The flood has one adapter, so one slot: its share is bounded by its seats, the others' by their weights."""
    weights = sum(WEIGHTS.values())
    off = max(abs(received[tenant] / (WEIGHTS[tenant] / weights) - 1) for tenant in WEIGHTS)
    note = ", ".join(f"{tenant} {share:.1%}" for tenant, share in received.items())
    return [
        Figure("longest wait for a turn", longest_wait, " steps", bound, at_most=True),
        Figure("share of tokens beside weight, furthest off", off, "", SHARE_TOLERANCE, at_most=True, note=note),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="engine steps to simulate; default: 100000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    parser.add_argument("--out", type=Path, help="append the JSON line to this; default: standard output")
    arguments = parser.parse_args()
    result = run(arguments.steps, arguments.seed, arguments.plot)
    print_table([result], Console(stderr=True), "The scheduler alone")
    write_lines([result], arguments.out)
    sys.exit(0 if all(figure.passed for figure in result.figures) else 1)


if __name__ == "__main__":
    main()
