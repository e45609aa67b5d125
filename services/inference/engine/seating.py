"""Which requests may take part in a step, and which prompts come first: fair shares of tenants and their adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.inference.engine.fair_share import VirtualCounters, max_min
from services.inference.engine.queues import Flow, by_tenant
from services.inference.engine.request import Request


class Seating:
    """Shares by weight over tenants, then over the adapters of each: seats max-min, prompts by what was received."""

    def __init__(self, weights: Mapping[str, float], max_num_seqs: int) -> None:
        self._weights = weights
        self._max_num_seqs = max_num_seqs
        self._names: dict[str, str] = {}
        self._tenants = VirtualCounters(self.weight)
        self._flows_of: dict[str, VirtualCounters] = {}

    def weight(self, name: str) -> float:
        """The weight of a tenant, or of an adapter by its full name."""
        return self._weights.get(name, 1.0)

    def set_active(self, flows: Mapping[str, Flow]) -> None:
        """Who has something to do. Also those who wait for their turn: they keep what they are owed."""
        self._names = {flow.key: flow.name for flow in flows.values()}
        tenants = by_tenant(flows.values())
        self._tenants.set_active(tenants)
        self._flows_of = {tenant: self._flows_of.get(tenant) or VirtualCounters(self._weight_of) for tenant in tenants}
        for tenant, of_tenant in tenants.items():
            self._flows_of[tenant].set_active([flow.key for flow in of_tenant])

    def seat(self, able: Mapping[Flow, Sequence[Request]]) -> dict[Flow, Sequence[Request]]:
        """Of the requests that are able to run, by rank in each flow, those that may: at most `max_num_seqs`."""
        if sum(map(len, able.values())) <= self._max_num_seqs:
            return dict(able)
        tenants = by_tenant(able)
        demands = {tenant: sum(len(able[flow]) for flow in of_tenant) for tenant, of_tenant in tenants.items()}
        seats = max_min(self._max_num_seqs, demands, self.weight, self._tenants.__getitem__)
        seated: dict[Flow, Sequence[Request]] = {}
        for tenant, of_tenant in tenants.items():
            demands = {flow.key: len(able[flow]) for flow in of_tenant}
            shares = max_min(seats[tenant], demands, self._weight_of, self._flows_of[tenant].__getitem__)
            seated |= {flow: able[flow][: shares[flow.key]] for flow in of_tenant}
        return seated

    def received(self, flow: Flow) -> tuple[float, float]:
        """What a flow's tenant has had, and the flow beside the tenant's others; lowest goes first."""
        return self._tenants[flow.tenant], self._flows_of[flow.tenant][flow.key]

    def charge(self, request: Request, cost: float) -> None:
        """The request receives service of this cost."""
        self._tenants.charge(request.tenant, cost)
        self._flows_of[request.tenant].charge(request.flow, cost)

    def _weight_of(self, key: str) -> float:
        return self.weight(self._names[key])
