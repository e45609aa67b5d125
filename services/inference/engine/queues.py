"""The requests the engine has, in the queues they wait in: first for their adapter, then by flow."""

from __future__ import annotations

import itertools
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from services.inference.engine.request import AdapterVersion, Request, RequestStatus


@dataclass(eq=False, slots=True)
class Flow:
    """The requests for one adapter, or for the base model, whose adapter is in memory: by rank.

    key: the adapter's content digest, '' for the base model; name: what its share's weight goes by
    """

    key: str
    tenant: str
    name: str
    adapter: AdapterVersion | None
    requests: list[Request] = field(default_factory=list)

    @property
    def is_new(self) -> bool:
        """Whether one of them has not had its first token."""
        return any(not request.num_output_tokens for request in reversed(self.requests))

    @property
    def num_blocks(self) -> int:
        return sum(len(request.block_ids) for request in self.requests)


class RequestQueues:
    """Owns the requests from the moment they come until they end.

    arriving: those whose adapter is not in memory yet, in the order they came
    flows: the others; a flow without requests is not there
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self.arriving: dict[Request, None] = {}
        self.flows: dict[str, Flow] = {}
        self._waiting: Counter[str] = Counter()
        self._sequence = itertools.count()

    def __iter__(self) -> Iterator[Request]:
        yield from self.arriving
        for flow in self.flows.values():
            yield from flow.requests

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks yet, or no longer."""
        return self._waiting.total()

    def accepts(self, flow: str) -> bool:
        """Whether there is room for one more request: a flow may fill half of what the others leave, so one that
        floods the queue cannot shut the others out.

        Source: dynamic thresholds, Choudhury and Hahne (1998), with α = 1.
        """
        return self._waiting[flow] < self._max_waiting - self.num_waiting

    def add(self, request: Request) -> None:
        request.sequence = next(self._sequence)
        self.arriving[request] = None
        self.enter(request)

    def adapter_arrived(self, request: Request) -> None:
        del self.arriving[request]
        name = request.adapter.name if request.adapter is not None else ""
        flow = self.flows.setdefault(request.flow, Flow(request.flow, request.tenant, name, request.adapter))
        insort(flow.requests, request, key=by_rank)

    def remove(self, request: Request) -> None:
        """A request ends; call `leave` too if it was still waiting."""
        if request in self.arriving:
            del self.arriving[request]
            return
        flow = self.flows[request.flow]
        flow.requests.remove(request)
        if not flow.requests:
            del self.flows[flow.key]

    def enter(self, request: Request) -> None:
        """It waits, from now on or again."""
        self._waiting[request.flow] += 1

    def leave(self, request: Request) -> None:
        """It waits no longer."""
        self._waiting[request.flow] -= 1
        if not self._waiting[request.flow]:
            del self._waiting[request.flow]

    def admitted(self) -> Iterator[Request]:
        """Those with blocks."""
        return (request for flow in self.flows.values() for request in flow.requests if request.is_admitted)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request is in the queue its state says, in order, and counted."""
        assert all(request.status is RequestStatus.WAITING_FOR_ADAPTER for request in self.arriving)
        for flow in self.flows.values():
            assert flow.requests, "an empty flow"
            assert flow.requests == sorted(flow.requests, key=by_rank), "a flow is out of order"
            for request in flow.requests:
                assert request.flow == flow.key and not request.status.finished
                assert request.status is not RequestStatus.WAITING_FOR_ADAPTER
                assert request.is_admitted or not request.block_ids, "a waiting request holds blocks"
        assert self._waiting == Counter(request.flow for request in self if not request.is_admitted)


def by_rank(request: Request) -> tuple[float, int]:
    return request.rank


def by_tenant(flows: Iterable[Flow]) -> dict[str, list[Flow]]:
    tenants: dict[str, list[Flow]] = {}
    for flow in flows:
        tenants.setdefault(flow.tenant, []).append(flow)
    return tenants
