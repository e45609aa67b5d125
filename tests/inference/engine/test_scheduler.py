"""The scheduler alone, under every order of arrivals and ends: budgets kept, books right, the first one moves."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.inference.config import SchedulerConfig
from services.inference.engine.interfaces import ScheduledRequest
from services.inference.engine.request import PENDING, Request, RequestStatus, SamplingParams, StoppingParams
from services.inference.engine.scheduler import BLOCK_PATIENCE, Scheduler
from tests.inference.engine.simulation import MemoryAdapters, adapter_version

MAX_MODEL_LEN = 20


def make_scheduler(
    *,
    num_blocks: int = 9,
    block_size: int = 4,
    max_num_seqs: int = 3,
    budget: int = 6,
    slots: int = 1,
    claims: int = 4,
    max_model_len: int = MAX_MODEL_LEN,
    max_waiting: int = 1000,
    **settings: Any,
) -> Scheduler:
    config = SchedulerConfig(
        max_model_len=min(max_model_len, (num_blocks - 1) * block_size),
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=block_size,
        max_waiting_requests=max_waiting,
        **settings,
    )
    return Scheduler(config, MemoryAdapters(claims=claims, slots=slots))


def make_request(
    name: str,
    prompt: int,
    adapter: str = "",
    *,
    first: int = 0,
    arrival: float = 0.0,
    priority: int = 0,
    salt: str = "",
) -> Request:
    return Request(
        name,
        list(range(first, first + prompt)),
        SamplingParams(),
        StoppingParams(1000),
        adapter_version(adapter) if adapter else None,
        arrival_time=arrival,
        priority=priority,
        cache_salt=salt,
    )


def put(scheduler: Scheduler, request: Request) -> Request:
    """Add a request as the engine does once its adapter is in memory."""
    scheduler.add(request)
    if request.adapter is not None:
        assert isinstance(scheduler.adapters, MemoryAdapters)
        assert scheduler.adapters.try_claim(request.adapter)
        if request.adapter.digest in scheduler.adapters.on_the_way:
            scheduler.adapters.arrive(request.adapter)
    scheduler.adapter_arrived(request)
    return request


def take_step(scheduler: Scheduler) -> list[ScheduledRequest]:
    """Schedule, and do to the requests what the engine does after a run."""
    step = scheduler.schedule()
    scheduler.launched(step)
    for request in [scheduled.request for scheduled in step]:
        scheduler.kv.remember(request, request.num_computed_tokens)
        if request.token_ids[-1] == PENDING:
            request.token_ids[-1] = 7
    scheduler.took(step, 0.0)
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
        self.slots = slots
        self.idle_steps = 0
        self.count = 0

    @rule(prompt=st.integers(1, MAX_MODEL_LEN - 1), adapter=st.sampled_from(["", "", "a", "b", "c"]))
    def add(self, prompt: int, adapter: str) -> None:
        self.count += 1
        put(self.scheduler, make_request(f"r{self.count}", prompt, adapter))

    @rule()
    def step(self) -> None:
        step = take_step(self.scheduler)
        requests = [scheduled.request for scheduled in step]
        assert len(set(requests)) == len(requests) <= self.scheduler.config.max_num_seqs
        assert all(scheduled.num_tokens > 0 for scheduled in step)
        assert sum(scheduled.num_tokens for scheduled in step) <= self.scheduler.config.max_num_batched_tokens
        adapters = {scheduled.request.flow for scheduled in step if scheduled.request.adapter is not None}
        assert len(adapters) <= self.slots, "more adapters in a step than slots"
        self.idle_steps = 0 if step or not self.scheduler.has_work else self.idle_steps + 1
        assert self.idle_steps <= 3, "nothing runs while there is work"
        for request in list(self.scheduler.requests()):
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
            for _ in range(100 * (self.count + 1)):
                if not self.scheduler.has_work:
                    break
                self.step()
            assert not self.scheduler.has_work, "some never end"
            self.books_agree()
            pool = self.scheduler.kv.pool
            assert pool.num_free == pool.num_blocks - 1


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_prompts_are_cut_to_the_budget_beside_decodes() -> None:
    scheduler = make_scheduler(budget=6)
    put(scheduler, make_request("short", 4))
    put(scheduler, make_request("long", 9))
    assert names(take_step(scheduler)) == [("short", 4), ("long", 2)]
    assert names(take_step(scheduler)) == [("short", 1), ("long", 5)]
    assert names(take_step(scheduler)) == [("short", 1), ("long", 2)]
    assert names(take_step(scheduler)) == [("short", 1), ("long", 1)]


def admitted(scheduler: Scheduler) -> list[str]:
    return [request.request_id for request in scheduler.queues.admitted()]


def finish(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.finish(request, RequestStatus.FINISHED_STOPPED)


def test_one_that_lacks_its_slot_lets_others_pass() -> None:
    scheduler = make_scheduler(slots=1, max_num_seqs=4, budget=8)
    held = put(scheduler, make_request("a1", 2, "a"))
    put(scheduler, make_request("b1", 2, "b"))
    put(scheduler, make_request("base", 2))
    put(scheduler, make_request("a2", 2, "a"))
    assert sorted(names(take_step(scheduler))) == [("a1", 2), ("a2", 2), ("base", 2)]
    finish(scheduler, held, *[r for r in scheduler.requests() if r.request_id == "a2"])
    assert ("b1", 2) in names(take_step(scheduler))


def test_small_requests_do_not_pass_a_large_one_for_ever() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=8, budget=40, slots=3)
    large = make_request("large", 19, "large")
    for round_ in range(2 * BLOCK_PATIENCE * scheduler.config.turn_tokens):
        if round_ == 4:
            put(scheduler, large)
        smalls = [request for request in scheduler.requests() if request is not large]
        finish(scheduler, *[request for request in smalls if request.num_output_tokens == 3])
        put(scheduler, make_request(f"small{round_}", 1, "small", arrival=round_))
        take_step(scheduler)
        if large.is_admitted:
            break
    assert large.is_admitted
    assert round_ > BLOCK_PATIENCE * scheduler.config.turn_tokens, "there was room for it all the time"


def test_the_last_one_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_seqs=3, budget=20)
    first, second = (
        put(scheduler, make_request(name, 8, first=10 * index, arrival=index))
        for index, name in enumerate(["1st", "2nd"])
    )
    take_step(scheduler)
    third = put(scheduler, make_request("third", 1, arrival=2))
    assert names(take_step(scheduler)) == [("1st", 1)]
    assert scheduler.preemptions == 1
    assert second.status is RequestStatus.PREEMPTED
    assert (second.num_computed_tokens, second.block_ids) == (0, [])
    assert len(second.token_ids) == 9, "what it said is kept"
    assert admitted(scheduler) == ["1st"]
    finish(scheduler, first)
    assert [name for name, _ in names(take_step(scheduler))] == ["2nd", "third"]
    assert third.first_token_time is None


def test_slots_pass_on_when_a_turn_is_used_and_the_parked_keep_their_blocks() -> None:
    scheduler = make_scheduler(num_blocks=30, max_num_seqs=4, budget=8, slots=1, turn_tokens=4)
    a, b = put(scheduler, make_request("a", 2, "a")), put(scheduler, make_request("b", 2, "b"))
    order = [names(take_step(scheduler))[0][0] for _ in range(14)]
    assert order[:4] == ["a", "b", "b", "b"] or order[:2] == ["a", "b"], "a first token is worth a swap"
    runs = [len(list(run)) for _, run in groupby(order)]
    assert max(runs) <= 5
    assert {"a", "b"} == set(order)
    parked = [request for request in (a, b) if request.status is RequestStatus.PARKED]
    assert len(parked) == 1 and parked[0].block_ids
    assert scheduler.preemptions == 0
    scheduler.check_integrity()


def test_while_one_adapter_is_copied_in_no_more_than_its_own_turn_is_taken() -> None:
    scheduler = make_scheduler(num_blocks=30, max_num_seqs=4, budget=8, slots=2, claims=3, turn_tokens=2)
    for name in "ab":
        put(scheduler, make_request(name, 2, name))
    for _ in range(4):
        take_step(scheduler)
    coming = put(scheduler, make_request("coming", 2, "c"))
    assert isinstance(scheduler.adapters, MemoryAdapters) and coming.adapter is not None
    scheduler.adapters.copying = {coming.adapter.digest}
    kept = [names(take_step(scheduler)) for _ in range(6)]
    assert all(len(step) == 1 for step in kept), "the slot that is left serves one of the two"
    assert {name for ((name, _),) in kept} == {"a", "b"}, "they take turns at it"
    scheduler.adapters.copying.clear()
    assert "coming" in dict(names(take_step(scheduler)))


def test_without_others_waiting_a_turn_goes_on() -> None:
    scheduler = make_scheduler(num_blocks=30, slots=1, turn_tokens=2)
    put(scheduler, make_request("a", 2, "a"))
    for _ in range(10):
        assert names(take_step(scheduler))[0][0] == "a"
    assert scheduler.parkings == 0


def test_seats_are_shared_by_adapters_and_a_flood_is_parked() -> None:
    scheduler = make_scheduler(num_blocks=60, max_num_seqs=4, budget=12, slots=3)
    for index in range(8):
        put(scheduler, make_request(f"flood{index}", 1, "flood", arrival=index))
    take_step(scheduler)
    assert len(admitted(scheduler)) == 4
    put(scheduler, make_request("light", 1, "light", arrival=99))
    step = names(take_step(scheduler))
    assert ("light", 1) in step, "its share of the seats is its own at once"
    assert len(step) == 4
    assert scheduler.parkings == 1


def test_tenants_share_slots_whatever_they_have_of_adapters() -> None:
    scheduler = make_scheduler(num_blocks=90, max_num_seqs=16, budget=64, slots=4, claims=16, turn_tokens=2)
    for index in range(10):
        put(scheduler, make_request(f"many{index}", 1, f"many/{index}"))
    for index in range(2):
        put(scheduler, make_request(f"few{index}", 1, f"few/{index}"))
    served: Counter[str] = Counter()
    for _ in range(40):
        served.update(scheduled.request.tenant for scheduled in take_step(scheduler))
    assert abs(served["many"] - served["few"]) <= 8, served


def test_priority_orders_the_requests_of_an_adapter() -> None:
    scheduler = make_scheduler(num_blocks=60, max_num_seqs=1, budget=8)
    put(scheduler, make_request("early", 1, arrival=0))
    put(scheduler, make_request("urgent", 1, arrival=1, priority=2))
    assert names(take_step(scheduler)) == [("urgent", 1)]


def test_weights_shape_the_shares() -> None:
    scheduler = make_scheduler(num_blocks=90, max_num_seqs=4, budget=8, slots=2, weights={"gold": 3.0})
    for index in range(6):
        put(scheduler, make_request(f"g{index}", 1, "gold/a", arrival=index))
        put(scheduler, make_request(f"t{index}", 1, "tin/a", arrival=index))
    step = take_step(scheduler)
    assert Counter(scheduled.request.tenant for scheduled in step) == {"gold": 3, "tin": 1}


def test_the_queue_keeps_room_for_others() -> None:
    scheduler = make_scheduler(max_waiting=8)
    accepted = 0
    while scheduler.queues.accepts("flood"):
        scheduler.add(Request(f"f{accepted}", [1], SamplingParams(), StoppingParams(4), adapter_version("flood")))
        accepted += 1
        flood = adapter_version("flood").digest
        if not scheduler.queues.accepts(flood):
            break
    assert accepted == 4, "half of what others leave"
    assert scheduler.queues.accepts("other")


def test_a_slow_machine_gives_prompts_smaller_shares() -> None:
    scheduler = make_scheduler(num_blocks=600, max_num_seqs=4, budget=400, max_model_len=1000, step_seconds=0.1)
    put(scheduler, make_request("long", 900))
    step = scheduler.schedule()
    assert names(step) == [("long", 400)], "nothing is known yet"
    scheduler.launched(step)
    scheduler.took(step, seconds=0.4)
    assert names(scheduler.schedule()) == [("long", 100)], "a millisecond a token, a tenth of a second a step"


def test_a_shared_beginning_is_computed_once() -> None:
    scheduler = make_scheduler(num_blocks=30, max_num_seqs=4, budget=20)
    first = put(scheduler, make_request("first", 10))
    take_step(scheduler)
    second = put(scheduler, make_request("second", 10))
    other = put(scheduler, make_request("other", 10, "a"))
    salted = put(scheduler, make_request("salted", 10, salt="x"))
    assert dict(names(take_step(scheduler))) == {"first": 1, "second": 2, "other": 10, "salted": 7}
    assert second.block_ids[:2] == first.block_ids[:2]
    assert (second.num_cached_tokens, other.num_cached_tokens, salted.num_cached_tokens) == (8, 0, 0)
    finish(scheduler, first, second, other, salted)
    assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_blocks - 1
    third = put(scheduler, make_request("third", 10))
    assert names(take_step(scheduler)) == [("third", 2)], "what is free is remembered until it is given out"
    assert third.num_cached_tokens == 8
