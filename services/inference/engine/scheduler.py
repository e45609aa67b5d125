"""Who takes part in the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from services.inference.config import SchedulerConfig
from services.inference.engine.interfaces import Adapters, ScheduledRequest
from services.inference.engine.kv_cache_manager import KVCacheManager
from services.inference.engine.request import Request, RequestStatus


class Scheduler:
    """Continuous batching under a token budget: the running requests first, then the waiting ones in order of arrival.

    Prompts are computed in chunks beside the decodes. A request that cannot have its adapter's slot lets others pass;
    one that finds no KV blocks does not, or large prompts would wait for ever. When a running request finds none, the
    one that came last is preempted and computed again later.
    """

    def __init__(self, config: SchedulerConfig, adapters: Adapters) -> None:
        self.config = config
        self.adapters = adapters
        self.kv = KVCacheManager(config.num_blocks, config.block_size)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[ScheduledRequest]:
        """The next step: every entry has its KV blocks and, if it has an adapter, its slot."""
        step: list[ScheduledRequest] = []
        budget = self.config.max_num_batched_tokens
        preempted = False
        for request in list(self.running):
            if request.status is not RequestStatus.RUNNING or not budget:
                continue
            num_tokens = min(request.num_uncomputed_tokens, budget)
            while not (fits := self.kv.can_append(request, num_tokens)) and self.running[-1] is not request:
                self._preempt(self.running[-1])
                preempted = True
            if not fits:
                self._preempt(request)
                preempted = True
                continue
            self.kv.append(request, num_tokens)
            step.append(ScheduledRequest(request, num_tokens, request.slot))
            budget -= num_tokens
        if not preempted:
            self._admit(step, budget)
        return step

    def _admit(self, step: list[ScheduledRequest], budget: int) -> None:
        for request in list(self.waiting):
            if not budget or len(self.running) >= self.config.max_num_seqs:
                return
            if request.status is RequestStatus.WAITING_FOR_ADAPTER:
                continue
            num_tokens = min(request.num_uncomputed_tokens, budget)
            if not self.kv.can_append(request, num_tokens):
                return
            if request.adapter is not None:
                request.slot = self.adapters.acquire(request.adapter)
                if request.slot is None:
                    continue
            self.kv.append(request, num_tokens)
            self.waiting.remove(request)
            self.running.append(request)
            request.set_status(RequestStatus.RUNNING)
            step.append(ScheduledRequest(request, num_tokens, request.slot))
            budget -= num_tokens

    def finish(self, request: Request, status: RequestStatus) -> None:
        """End a request, wherever it is, and take back what it holds."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._take_back(request)
        request.set_status(status)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._take_back(request)
        request.set_status(RequestStatus.PREEMPTED)
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _take_back(self, request: Request) -> None:
        self.kv.free(request)
        if request.slot is not None and request.adapter is not None:
            self.adapters.release(request.adapter)
            request.slot = None

    def requests(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, states, blocks and slots agree."""
        self.kv.check_integrity(self.running)
        assert all(request.status is RequestStatus.RUNNING for request in self.running)
        for request in self.waiting:
            assert request.status in (
                RequestStatus.WAITING_FOR_ADAPTER,
                RequestStatus.WAITING,
                RequestStatus.PREEMPTED,
            )
            assert not request.block_ids, "a waiting request holds blocks"
            assert request.slot is None, "a waiting request holds a slot"
        for request in self.running:
            assert (request.slot is None) == (request.adapter is None), "a running request lacks its slot"
        assert len(self.running) <= self.config.max_num_seqs
