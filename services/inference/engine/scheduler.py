"""Who takes part in the next step.

Adapters take turns at the slots (`turns`); tenants and their adapters share seats and prompt tokens (`seating`); the
requests for one adapter go by rank: arrival, moved by priority. A step computes one token of every request that
decodes, and of prompts, in chunks, what the budgets of tokens and of time leave (`step_cost`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from services.inference.config import SchedulerConfig
from services.inference.engine.fair_share import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST
from services.inference.engine.interfaces import ScheduledRequest, Slots
from services.inference.engine.kv_cache_manager import KVCacheManager
from services.inference.engine.queues import Flow, RequestQueues, by_rank
from services.inference.engine.request import Request, RequestStatus
from services.inference.engine.seating import Seating
from services.inference.engine.step_cost import StepCost
from services.inference.engine.turns import Demand, Turns

BLOCK_PATIENCE = 2
"""Quanta of steps a request waits for KV blocks before nobody is let in ahead of it."""

Seated = Mapping[Flow, Sequence[Request]]
Step = list[ScheduledRequest]


class Scheduler:
    """A request that lacks its adapter or its turn lets others pass. When a running request finds no KV blocks, the one
    of the highest rank is preempted and computed again later, so the first one always moves."""

    def __init__(self, config: SchedulerConfig, adapters: Slots) -> None:
        self.config = config
        self.adapters = adapters
        self.kv = KVCacheManager(
            config.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.queues = RequestQueues(config.max_waiting_requests)
        self.seating = Seating(config.weights, config.max_num_seqs)
        self.turns = Turns(adapters, config.turn_tokens, self.seating.weight)
        self.cost = StepCost(config.step_seconds)
        self.preemptions = 0
        self.parkings = 0
        self._starving: str | None = None

    @property
    def has_work(self) -> bool:
        """Whether a step may bring something."""
        return bool(self.queues.flows)

    def requests(self) -> Iterator[Request]:
        return iter(self.queues)

    def add(self, request: Request) -> None:
        """Take in a request that waits for its adapter; ask `queues.accepts` first."""
        self.queues.add(request)

    def adapter_arrived(self, request: Request) -> None:
        """Its adapter is in host memory, or it needs none: it may run."""
        self.queues.adapter_arrived(request)
        request.set_status(RequestStatus.WAITING)

    def finish(self, request: Request, status: RequestStatus) -> None:
        """End a request, wherever it is, and take back what it holds."""
        self.queues.remove(request)
        if not request.is_admitted:
            self._stops_waiting(request)
        self.kv.free(request)
        request.set_status(status)

    def schedule(self) -> Step:
        """The next step: every entry has its KV blocks and, if it has an adapter, its slot, until `launched`."""
        self.seating.set_active(self.queues.flows)
        able = self._able_to_run()
        self._begin_turns(able)
        seated = self.seating.seat({flow: able[flow] for flow in able if not flow.adapter or flow.key in self.turns})
        step: Step = []
        self._schedule_decodes(seated, step)
        self._schedule_prompts(seated, step)
        self._park(seated)
        self._use_turns(step)
        return step

    def launched(self, step: Step) -> None:
        """The step is on its way. Whatever is launched later comes after it, copies into the pool too: so the next step
        may go on from what it computes, and its slots and the blocks that it frees may pass on at once."""
        for scheduled in step:
            scheduled.request.advance(scheduled.num_tokens)
        self.turns.end()

    def took(self, step: Step, seconds: float) -> None:
        """The step is read, and has taken so long."""
        prompts = [scheduled.num_tokens for scheduled in step if scheduled.num_tokens > 1]
        self.cost.observe(len(step) - len(prompts), sum(prompts), seconds)

    def _able_to_run(self) -> dict[Flow, Sequence[Request]]:
        """The requests of each flow, without those whose last token is on its way and those that wait for blocks there
        are none of: for these a flow gets neither turn nor seat."""
        reserve = sum(request.status is RequestStatus.RUNNING for request in self.queues.admitted())
        able: dict[Flow, Sequence[Request]] = {}
        for flow in list(self.queues.flows.values()):
            requests = [request for request in flow.requests if not request.is_ending]
            first = next((request for request in requests if not request.is_admitted), None)
            if first is not None and not self._may_enter(first, reserve):
                requests = [request for request in requests if request.is_admitted]
            if requests:
                able[flow] = requests
        return able

    def _begin_turns(self, able: Mapping[Flow, Sequence[Request]]) -> None:
        """Settle which adapters have a slot in this step. The base model needs none, but a seat."""
        demands = {flow.key: Demand(flow.adapter, flow.tenant, flow.is_new) for flow in able if flow.adapter}
        self.turns.begin(demands, most=max(1, self.config.max_num_seqs - (len(demands) < len(able))))

    def _may_enter(self, request: Request, reserve: int) -> bool:
        """Whether the first of a flow to wait finds room, with `reserve` blocks left for those that run.

        One that has waited long may take blocks from a flow that has more, and no other flow is let in before it.
        """
        request.waiting_steps += 1
        if self._starving is None and request.waiting_steps > BLOCK_PATIENCE * self.config.turn_tokens:
            self._starving = request.flow
        if self._starving == request.flow:
            self._take_blocks_for(request, reserve)
        elif self._starving is not None:
            return False
        return self.kv.can_admit(request, reserve if any(self.queues.admitted()) else 0)

    def _schedule_decodes(self, seated: Seated, step: Step) -> None:
        decodes = [
            request
            for requests in seated.values()
            for request in requests
            if request.is_admitted and request.num_uncomputed_tokens == 1
        ]
        for request in sorted(decodes, key=by_rank):
            if request.is_admitted and self._find_room(request, 1, step):
                self._append(request, 1, step)
                self.seating.charge(request, OUTPUT_TOKEN_COST)

    def _schedule_prompts(self, seated: Seated, step: Step) -> None:
        """Prompts, a chunk at a time, of the flow that has had least, until a budget is spent; within a flow those that
        have blocks before those that want some."""
        in_step = {scheduled.request for scheduled in step}
        prompts = {
            flow: iter(sorted((r for r in requests if r not in in_step), key=lambda r: not r.is_admitted))
            for flow, requests in seated.items()
        }
        budget = self.config.max_num_batched_tokens - len(step)
        if (affordable := self.cost.prompt_budget(len(step))) is not None:
            budget = min(budget, affordable)
        while budget > 0 and prompts:
            flow = min(prompts, key=self.seating.received)
            request = next(prompts[flow], None)
            if request is None or not (request.is_admitted or self._admit(request, step)):
                del prompts[flow]
            elif self._find_room(request, num_tokens := min(request.num_uncomputed_tokens, budget), step):
                self._append(request, num_tokens, step)
                self.seating.charge(request, PROMPT_TOKEN_COST * num_tokens)
                budget -= num_tokens

    def _append(self, request: Request, num_tokens: int, step: Step) -> None:
        self.kv.append(request, num_tokens)
        if request.status is RequestStatus.PARKED:
            request.set_status(RequestStatus.RUNNING)
        slot = self.turns.slot(request.flow) if request.adapter is not None else None
        step.append(ScheduledRequest(request, num_tokens, slot))

    def _admit(self, request: Request, step: Step) -> bool:
        """Let a request in, if the KV cache has room for all it brings and a block for each that runs already."""
        if self._starving not in (None, request.flow):
            return False
        if not self.kv.can_admit(request, reserve=len(step) if any(self.queues.admitted()) else 0):
            return False
        self.kv.admit(request)
        self._stops_waiting(request)
        request.set_status(RequestStatus.RUNNING)
        return True

    def _stops_waiting(self, request: Request) -> None:
        self.queues.leave(request)
        request.waiting_steps = 0
        if self._starving == request.flow:
            self._starving = None

    def _find_room(self, request: Request, num_tokens: int, step: Step) -> bool:
        """Preempt requests of higher rank until the next tokens fit; in the end the request itself."""
        while not self.kv.can_append(request, num_tokens):
            in_step = {scheduled.request for scheduled in step}
            last = max((other for other in self.queues.admitted() if other not in in_step), key=by_rank)
            self._preempt(last)
            if last is request:
                return False
        return True

    def _take_blocks_for(self, request: Request, reserve: int) -> None:
        """Preempt requests of the flow that has most blocks, as long as it has more than this one would."""
        wanted = self.queues.flows[request.flow].num_blocks + -(-len(request.token_ids) // self.config.block_size)
        while not self.kv.can_admit(request, reserve):
            most = max(self.queues.flows.values(), key=lambda flow: flow.num_blocks)
            if most.num_blocks <= wanted:
                return
            self._preempt(max((other for other in most.requests if other.is_admitted), key=by_rank))

    def _preempt(self, request: Request) -> None:
        self.kv.free(request)
        request.set_status(RequestStatus.PREEMPTED)
        self.queues.enter(request)
        self.preemptions += 1

    def _park(self, seated: Seated) -> None:
        """Those whose adapter's turn, or whose seat, went to another keep their blocks."""
        at_work = {request for requests in seated.values() for request in requests}
        for request in self.queues.admitted():
            if request.status is RequestStatus.RUNNING and request not in at_work and not request.is_ending:
                request.set_status(RequestStatus.PARKED)
                self.parkings += 1

    def _use_turns(self, step: Step) -> None:
        """Count the step to the turns, by the longest request of each."""
        longest: dict[str, int] = {}
        for scheduled in step:
            flow = scheduled.request.flow
            longest[flow] = max(longest.get(flow, 0), scheduled.num_tokens)
        for key in self.turns:
            self.turns.use(key, longest.get(key, 0))

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, states, blocks and turns agree."""
        admitted = list(self.queues.admitted())
        self.queues.check_integrity()
        self.kv.check_integrity(admitted)
        self.turns.check_integrity()
        assert self._starving is None or self._starving in self.queues.flows
        running = sum(request.status is RequestStatus.RUNNING and not request.is_ending for request in admitted)
        assert running <= self.config.max_num_seqs, "more run than there are seats"
