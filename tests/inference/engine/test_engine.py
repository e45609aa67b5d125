"""The engine with a scripted model: whatever happens in whatever order, every request ends once, as the script says."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.common.errors import DataLoss
from services.inference.config import SchedulerConfig
from services.inference.engine.engine import DeadlinePassedError, Engine
from services.inference.engine.interfaces import Runner, ScheduledRequest
from services.inference.engine.loop import EngineLoop
from services.inference.engine.messages import (
    AbortRequest,
    AddRequest,
    EngineDied,
    EngineInput,
    EngineOutput,
    GetStats,
    RequestFinished,
    RequestOutput,
    RequestStarted,
    Shutdown,
    StatsReply,
)
from services.inference.engine.request import AdapterVersion, SamplingParams, StoppingParams
from services.inference.engine.scheduler import Scheduler
from tests.inference.engine.ahead import RunningAhead
from tests.inference.engine.simulation import VOCAB, MemoryAdapters, ScriptedRunner, adapter_version, script

MAX_MODEL_LEN = 24
BLOCK_SIZE = 4
ADAPTERS = [adapter_version(name) for name in "abcd"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """An engine and all that it was handed."""

    engine: Engine
    runner: ScriptedRunner
    adapters: MemoryAdapters
    clock: Clock
    steps: list[list[ScheduledRequest]]


def make_bench(
    *,
    num_blocks: int = 9,
    max_num_seqs: int = 3,
    budget: int = 5,
    claims: int = 3,
    slots: int = 2,
    ahead: Callable[[Runner], Runner] = lambda runner: runner,
) -> Bench:
    config = SchedulerConfig(
        max_model_len=MAX_MODEL_LEN,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        block_size=BLOCK_SIZE,
    )
    adapters, clock = MemoryAdapters(claims, slots), Clock()
    runner = ScriptedRunner(BLOCK_SIZE, adapters)
    steps: list[list[ScheduledRequest]] = []

    def log(step: list[ScheduledRequest]) -> None:
        steps.append(step)
        assert not any(each.request.num_output_tokens >= each.request.stopping.max_tokens for each in step)

    engine = Engine(Scheduler(config, adapters), ahead(runner), adapters, clock, log)
    return Bench(engine, runner, adapters, clock, steps)


@dataclass
class Sent:
    """What was asked for, and what has come back."""

    add: AddRequest
    deadline: float | None
    script: list[int]
    ends: str
    started: bool = False
    aborted: bool = False
    tokens: list[int] = field(default_factory=list)
    finished: RequestFinished | None = None


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(7, 12),
        max_num_seqs=st.integers(1, 4),
        more=st.integers(0, 4),
        claims=st.integers(2, 4),
        slots=st.integers(1, 2),
        ahead=st.booleans(),
    )
    def start(self, num_blocks: int, max_num_seqs: int, more: int, claims: int, slots: int, ahead: bool) -> None:
        bench = make_bench(
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            budget=max_num_seqs + more,
            claims=claims,
            slots=slots,
            ahead=self.run_ahead if ahead else lambda runner: runner,
        )
        self.engine, self.runner, self.adapters, self.clock = bench.engine, bench.runner, bench.adapters, bench.clock
        self.sent: dict[str, Sent] = {}
        self.failed: set[str] = set()

    def run_ahead(self, runner: Runner) -> Runner:
        """Some requests' tokens are the host's to choose, and some come late."""
        return RunningAhead(
            runner,
            is_left_to_host=lambda request: request.stopping.min_tokens == 3,
            is_late=lambda _request, token: token % 5 == 0,
        )

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=MAX_MODEL_LEN - 1),
        room=st.integers(1, MAX_MODEL_LEN),
        adapter=st.sampled_from([None, None, *ADAPTERS]),
        stops=st.frozensets(st.integers(0, VOCAB - 1), max_size=10),
        min_tokens=st.integers(0, 3),
        timeout=st.sampled_from([None, None, None, 3.0, 10.0]),
    )
    def add(
        self,
        prompt: list[int],
        room: int,
        adapter: AdapterVersion | None,
        stops: frozenset[int],
        min_tokens: int,
        timeout: float | None,
    ) -> None:
        most = min(room, MAX_MODEL_LEN - len(prompt))
        stopping = StoppingParams(most, min(min_tokens, most), stops)
        add = AddRequest(f"r{len(self.sent)}", prompt, SamplingParams(), stopping, adapter, timeout)
        deadline = None if timeout is None else self.clock.now + timeout
        self.sent[add.request_id] = Sent(add, deadline, *script(prompt, adapter, stopping))
        self.engine.add(add)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sent = data.draw(st.sampled_from(list(self.sent.values())))
        sent.aborted = True
        self.engine.abort(sent.add.request_id)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def a_row_will_fail(self, data: st.DataObject) -> None:
        self.runner.fails.add(data.draw(st.sampled_from(list(self.sent))))

    @rule()
    def abort_a_stranger(self) -> None:
        self.engine.abort("nobody")

    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.take(self.engine.step())

    @precondition(lambda self: self.adapters.on_the_way)
    @rule(data=st.data(), fails=st.sampled_from([False, False, True]))
    def adapter_comes(self, data: st.DataObject, fails: bool) -> None:
        digest = data.draw(st.sampled_from(sorted(self.adapters.on_the_way)))
        adapter = next(adapter for adapter in ADAPTERS if adapter.digest == digest)
        if fails:
            self.failed.add(digest)
            self.adapters.fail(adapter)
        else:
            self.adapters.arrive(adapter)

    @rule(seconds=st.sampled_from([0.5, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    def take(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            assert isinstance(output, RequestStarted | RequestOutput)
            sent = self.sent[output.request_id]
            assert sent.finished is None, "a word after the last word"
            if isinstance(output, RequestStarted):
                assert not sent.started, "started twice"
                sent.started = True
                continue
            assert (output.times is not None) == (bool(output.token_ids) and not sent.tokens)
            sent.tokens += output.token_ids
            assert not output.token_ids or sent.started
            assert sent.tokens == sent.script[: len(sent.tokens)], "not what the script says"
            if output.finished is not None:
                sent.finished = output.finished
                self.check_end(sent, output.finished)

    def check_end(self, sent: Sent, finished: RequestFinished) -> None:
        match finished.reason:
            case "STOP" | "LENGTH":
                assert (sent.tokens, finished.reason) == (sent.script, sent.ends)
                assert (finished.stop_token_id == sent.tokens[-1]) == (finished.reason == "STOP")
            case "CANCELLED":
                assert sent.aborted
            case _:
                if isinstance(finished.error, DeadlinePassedError):
                    assert sent.deadline is not None and sent.deadline <= self.clock.now
                else:
                    assert isinstance(finished.error, DataLoss)
                    lost = sent.add.adapter is not None and sent.add.adapter.digest in self.failed
                    assert lost or sent.add.request_id in self.runner.fails

    @invariant()
    def books_agree(self) -> None:
        self.engine.check_integrity()
        deadlines = [s.deadline for s in self.sent.values() if s.deadline is not None and s.finished is None]
        if deadlines and not any(s.aborted for s in self.sent.values()):
            assert self.engine.next_deadline() == max(0.0, min(deadlines) - self.clock.now)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        steps = 0
        while self.engine.has_requests:
            for digest in list(self.adapters.on_the_way):
                self.adapters.arrive(next(adapter for adapter in ADAPTERS if adapter.digest == digest))
            outputs = self.engine.step()
            self.take(outputs)
            self.books_agree()
            steps += 1
            assert steps < 5000, "requests wait for ever"
        self.take(self.engine.take_outputs())
        assert all(sent.finished is not None for sent in self.sent.values()), "a request was lost"
        pool = self.engine.scheduler.kv.pool
        assert pool.num_free == pool.num_blocks - 1
        assert not any(self.adapters.references.values())
        assert not any(self.adapters.claims.values())
        stats = self.engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.generation_tokens == sum(len(sent.tokens) for sent in self.sent.values())


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def add(
    name: str,
    prompt: list[int],
    *,
    adapter: AdapterVersion | None = None,
    max_tokens: int = 4,
    timeout: float | None = None,
) -> AddRequest:
    return AddRequest(name, prompt, SamplingParams(), StoppingParams(max_tokens), adapter, timeout)


def run_out(bench: Bench, limit: int = 500) -> dict[str, list[int]]:
    """Step until nothing is left; the tokens of each request."""
    tokens: dict[str, list[int]] = {}
    for _ in range(limit):
        for output in bench.engine.step():
            if isinstance(output, RequestOutput):
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
        bench.engine.check_integrity()
        if not bench.engine.has_requests:
            return tokens
    raise AssertionError("requests wait for ever")


def test_preemption_changes_no_answer() -> None:
    bench = make_bench(num_blocks=7, max_num_seqs=3, budget=4)
    adds = [add(f"r{index}", [index, 5, 9, 2], max_tokens=16) for index in range(4)]
    for message in adds:
        bench.engine.add(message)
    tokens = run_out(bench)
    assert bench.engine.stats().preemptions > 0
    for message in adds:
        assert tokens[message.request_id] == script(message.prompt_token_ids, None, message.stopping)[0]


def test_a_row_that_fails_ends_alone() -> None:
    bench = make_bench(budget=16, max_num_seqs=3)
    for name in ("good", "bad", "fine"):
        bench.engine.add(add(name, [1, 2], max_tokens=3))
    bench.runner.fails = {"bad"}
    ends = {
        output.request_id: output.finished
        for _ in range(3)
        for output in bench.engine.step()
        if isinstance(output, RequestOutput) and output.finished is not None
    }
    assert {name: end.reason for name, end in ends.items()} == {"good": "LENGTH", "bad": "ERROR", "fine": "LENGTH"}
    assert isinstance(ends["bad"].error, DataLoss)


def test_a_waiting_adapter_holds_no_one_up() -> None:
    bench = make_bench(budget=8)
    bench.engine.add(add("waits", [1], adapter=ADAPTERS[0]))
    bench.engine.add(add("base", [2], max_tokens=5))
    for _ in range(5):
        bench.engine.step()
    assert [scheduled.request.request_id for step in bench.steps for scheduled in step] == ["base"] * 5
    bench.adapters.arrive(ADAPTERS[0])
    assert run_out(bench) == {"waits": script([1], ADAPTERS[0], StoppingParams(4))[0]}


def test_a_failed_adapter_is_fetched_again_for_the_next_request() -> None:
    bench = make_bench()
    for name in ("one", "two"):
        bench.engine.add(add(name, [1], adapter=ADAPTERS[0]))
    bench.engine.step()
    bench.adapters.fail(ADAPTERS[0])
    outputs = bench.engine.step()
    assert [(o.request_id, o.finished.reason) for o in outputs] == [("one", "ERROR"), ("two", "ERROR")]
    bench.engine.add(add("three", [1], adapter=ADAPTERS[0]))
    assert bench.engine.step() == []
    bench.adapters.arrive(ADAPTERS[0])
    assert len(run_out(bench)["three"]) == 4


def test_more_adapters_than_claims_and_slots() -> None:
    bench = make_bench(claims=2, slots=1, budget=8)
    for index in range(8):
        bench.engine.add(add(f"r{index}", [index], adapter=ADAPTERS[index % 4]))
    tokens: dict[str, list[int]] = {}
    for _ in range(100):
        for digest in list(bench.adapters.on_the_way):
            bench.adapters.arrive(next(adapter for adapter in ADAPTERS if adapter.digest == digest))
        for output in bench.engine.step():
            if isinstance(output, RequestOutput):
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
        bench.engine.check_integrity()
    assert tokens == {f"r{index}": script([index], ADAPTERS[index % 4], StoppingParams(4))[0] for index in range(8)}
    assert bench.engine.stats().adapter_loads >= 4


def test_times_and_tier_are_the_clocks() -> None:
    bench = make_bench()
    bench.engine.add(add("r", [1, 2], adapter=ADAPTERS[0]))
    bench.engine.step()
    bench.clock.now += 2
    bench.adapters.arrive(ADAPTERS[0])
    outputs = bench.engine.step()
    assert isinstance(outputs[0], RequestStarted) and outputs[0].tier == "STORE"
    assert isinstance(outputs[1], RequestOutput) and outputs[1].times is not None
    assert (outputs[1].times.queue, outputs[1].times.adapter_load, outputs[1].times.ttft) == (2, 2, 2)
    bench.engine.abort("r")
    bench.engine.add(add("again", [1, 2], adapter=ADAPTERS[0]))
    _, started, first = bench.engine.step()
    assert isinstance(started, RequestStarted) and started.tier == "GPU"
    assert isinstance(first, RequestOutput) and first.times is not None and first.times.adapter_load == 0


# ---- the loop


@dataclass
class RunningLoop:
    """An engine loop in its thread."""

    loop: EngineLoop
    outputs: queue.SimpleQueue[EngineOutput]
    thread: threading.Thread

    @classmethod
    def start(cls, bench: Bench) -> RunningLoop:
        inbox: queue.SimpleQueue[EngineInput] = queue.SimpleQueue()
        loop, outputs = EngineLoop(bench.engine, inbox), queue.SimpleQueue[EngineOutput]()
        loop.emit = lambda batch: [outputs.put(output) for output in batch] and None
        thread = threading.Thread(target=loop.run)
        thread.start()
        return cls(loop, outputs, thread)

    def next(self) -> EngineOutput:
        return self.outputs.get(timeout=30)

    def until_finished(self) -> RequestFinished:
        while True:
            output = self.next()
            if isinstance(output, RequestOutput) and output.finished is not None:
                return output.finished

    def end(self) -> None:
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()


def test_the_loop_drains_before_it_ends() -> None:
    running = RunningLoop.start(make_bench())
    running.loop.inbox.put(add("r", [1, 2], max_tokens=20))
    running.loop.inbox.put(Shutdown(drain=True))
    assert running.until_finished().reason == "LENGTH"
    running.end()


def test_the_loop_cancels_what_it_does_not_drain() -> None:
    running = RunningLoop.start(make_bench())
    running.loop.inbox.put(add("r", [1], adapter=ADAPTERS[0]))
    running.loop.inbox.put(Shutdown(drain=True))
    running.loop.inbox.put(Shutdown(drain=False))
    assert running.until_finished().reason == "CANCELLED"
    running.end()


@pytest.mark.parametrize("drain", [True, False])
def test_the_loop_reads_what_it_launched_before_it_ends(drain: bool) -> None:
    bench = make_bench(ahead=RunningAhead)
    running = RunningLoop.start(bench)
    running.loop.inbox.put(add("r", [1, 2], max_tokens=20))
    assert isinstance(running.next(), RequestStarted)
    running.loop.inbox.put(Shutdown(drain=drain))
    assert running.until_finished().reason in ("LENGTH", "LENGTH" if drain else "CANCELLED")
    running.end()
    runner = bench.engine.runner
    assert isinstance(runner, RunningAhead)
    assert Counter(what for what, _ in runner.log) == {"launch": len(runner.log) // 2, "read": len(runner.log) // 2}


@pytest.mark.parametrize("timeout", [1e12, float("inf")])
def test_a_deadline_beyond_all_clocks_is_no_harm(timeout: float) -> None:
    running = RunningLoop.start(make_bench())
    running.loop.inbox.put(add("r", [1], adapter=ADAPTERS[0], timeout=timeout))
    running.loop.inbox.put(GetStats(1))
    assert isinstance(running.next(), StatsReply)
    running.loop.inbox.put(AbortRequest("r"))
    assert running.until_finished().reason == "CANCELLED"
    running.loop.inbox.put(Shutdown(drain=True))
    running.end()


def test_a_deadline_wakes_an_idle_loop() -> None:
    bench = make_bench()
    running = RunningLoop.start(bench)
    running.loop.inbox.put(add("r", [1], adapter=ADAPTERS[0], timeout=0.0))
    assert isinstance(running.until_finished().error, DeadlinePassedError)
    running.loop.inbox.put(Shutdown(drain=True))
    running.end()


def test_a_fault_of_the_runner_is_told(caplog: pytest.LogCaptureFixture) -> None:
    bench = make_bench()
    bench.runner.launch = lambda _step: 1 / 0  # type: ignore[assignment, method-assign]
    with caplog.at_level(logging.CRITICAL):
        running = RunningLoop.start(bench)
        running.loop.inbox.put(add("r", [1]))
        output = running.next()
        running.end()
    assert isinstance(output, EngineDied)
    assert "ZeroDivisionError" in output.error
