"""The scheduler alone, under every order of arrivals and ends: budgets kept, books right, the first one moves."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.inference.config import SchedulerConfig
from services.inference.engine.interfaces import ScheduledRequest
from services.inference.engine.request import Request, RequestStatus, SamplingParams, StoppingParams
from services.inference.engine.scheduler import Scheduler
from tests.inference.engine.simulation import MemoryAdapters, adapter_version

MAX_MODEL_LEN = 20


def make_scheduler(
    *, num_blocks: int = 9, block_size: int = 4, max_num_seqs: int = 3, budget: int = 6, slots: int = 1, claims: int = 4
) -> Scheduler:
    config = SchedulerConfig(
        max_model_len=min(MAX_MODEL_LEN, (num_blocks - 1) * block_size),
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=block_size,
    )
    return Scheduler(config, MemoryAdapters(claims=claims, slots=slots))


def make_request(name: str, prompt: int, adapter: str = "") -> Request:
    version = adapter_version(adapter) if adapter else None
    return Request(name, list(range(prompt)), SamplingParams(), StoppingParams(1000), version)


def put(scheduler: Scheduler, request: Request) -> Request:
    """Add a request as the engine does once its adapter is in memory."""
    scheduler.add(request)
    if request.adapter is not None:
        assert isinstance(scheduler.adapters, MemoryAdapters)
        assert scheduler.adapters.try_claim(request.adapter)
        if request.adapter.digest in scheduler.adapters.on_the_way:
            scheduler.adapters.arrive(request.adapter)
    request.set_status(RequestStatus.WAITING)
    return request


def take_step(scheduler: Scheduler) -> list[ScheduledRequest]:
    """Schedule, and do to the requests what the engine does after a run."""
    step = scheduler.schedule()
    for scheduled in step:
        samples = scheduled.samples
        scheduled.request.num_computed_tokens += scheduled.num_tokens
        if samples:
            scheduled.request.token_ids.append(7)
    return step


def names(step: list[ScheduledRequest]) -> list[tuple[str, int]]:
    return [(scheduled.request.request_id, scheduled.num_tokens) for scheduled in step]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 14), max_num_seqs=st.integers(1, 4), more=st.integers(0, 6), slots=st.integers(1, 2)
    )
    def start(self, num_blocks: int, max_num_seqs: int, more: int, slots: int) -> None:
        self.scheduler = make_scheduler(
            num_blocks=num_blocks, max_num_seqs=max_num_seqs, budget=max_num_seqs + more, slots=slots
        )
        self.count = 0

    @rule(prompt=st.integers(1, MAX_MODEL_LEN - 1), adapter=st.sampled_from(["", "", "a", "b", "c"]))
    def add(self, prompt: int, adapter: str) -> None:
        self.count += 1
        put(self.scheduler, make_request(f"r{self.count}", prompt, adapter))

    @rule()
    def step(self) -> None:
        first = self.scheduler.running[0] if self.scheduler.running else None
        waited = bool(self.scheduler.waiting)
        step = take_step(self.scheduler)
        assert step or not (waited or first), "nothing runs while there is work"
        if first is not None:
            assert step[0].request is first, "the request that came first does not move on"
        requests = [scheduled.request for scheduled in step]
        assert len(set(requests)) == len(requests) <= self.scheduler.config.max_num_seqs
        assert all(scheduled.num_tokens > 0 for scheduled in step)
        assert sum(scheduled.num_tokens for scheduled in step) <= self.scheduler.config.max_num_batched_tokens
        for request in list(self.scheduler.running):
            if len(request.token_ids) >= self.scheduler.config.max_model_len:
                self._end(request, RequestStatus.FINISHED_LENGTH)

    @precondition(lambda self: any(self.scheduler.requests()))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(list(self.scheduler.requests()))), RequestStatus.FINISHED_CANCELLED)

    def _end(self, request: Request, status: RequestStatus) -> None:
        self.scheduler.finish(request, status)
        if request.adapter is not None:
            self.scheduler.adapters.unclaim(request.adapter)

    @invariant()
    def books_agree(self) -> None:
        self.scheduler.check_integrity()
        self.scheduler.adapters.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            for request in list(self.scheduler.requests()):
                self._end(request, RequestStatus.FINISHED_CANCELLED)
            self.books_agree()
            pool = self.scheduler.kv.pool
            assert pool.num_free == pool.num_blocks - 1


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_prompts_are_cut_to_the_budget_beside_decodes() -> None:
    scheduler = make_scheduler(budget=6)
    put(scheduler, make_request("short", 4))
    put(scheduler, make_request("long", 9))
    assert names(take_step(scheduler)) == [("short", 4), ("long", 2)]
    assert names(take_step(scheduler)) == [("short", 1), ("long", 5)]
    assert names(take_step(scheduler)) == [("short", 1), ("long", 2)]
    assert names(take_step(scheduler)) == [("short", 1), ("long", 1)]


def test_one_that_lacks_its_slot_lets_others_pass() -> None:
    scheduler = make_scheduler(slots=1, max_num_seqs=4, budget=8)
    held = put(scheduler, make_request("a1", 2, "a"))
    put(scheduler, make_request("b1", 2, "b"))
    put(scheduler, make_request("base", 2))
    put(scheduler, make_request("a2", 2, "a"))
    assert names(take_step(scheduler)) == [("a1", 2), ("base", 2), ("a2", 2)]
    for request in (held, scheduler.running[-1]):
        scheduler.finish(request, RequestStatus.FINISHED_STOPPED)
    assert ("b1", 2) in names(take_step(scheduler))


def test_one_that_lacks_blocks_is_not_passed() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_seqs=4, budget=40)
    put(scheduler, make_request("first", 16))
    put(scheduler, make_request("large", 12))
    put(scheduler, make_request("small", 1))
    assert names(take_step(scheduler)) == [("first", 16)]
    scheduler.finish(scheduler.running[0], RequestStatus.FINISHED_STOPPED)
    assert names(take_step(scheduler)) == [("large", 12), ("small", 1)]


def test_the_last_one_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_seqs=3, budget=20)
    for name in ("first", "second"):
        put(scheduler, make_request(name, 8))
    assert names(take_step(scheduler)) == [("first", 8), ("second", 8)]
    put(scheduler, make_request("third", 1))
    assert names(take_step(scheduler)) == [("first", 1)]
    assert scheduler.preemptions == 1
    second, third = scheduler.waiting
    assert (second.request_id, third.request_id) == ("second", "third")
    assert second.status is RequestStatus.PREEMPTED
    assert (second.num_computed_tokens, second.block_ids) == (0, [])
    assert len(second.token_ids) == 9, "what it said is kept"
    scheduler.finish(scheduler.running[0], RequestStatus.FINISHED_STOPPED)
    assert names(take_step(scheduler)) == [("second", 9), ("third", 1)]
