"""The engine: requests in, tokens out, one step at a time. Knows no tensors, no network and no text."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from services.inference.engine.adapter_control import AdapterControl
from services.inference.engine.interfaces import Adapters, LaunchedStep, Runner, SampledToken, ScheduledRequest
from services.inference.engine.messages import (
    AddRequest,
    EngineOutput,
    EngineStats,
    RequestFinished,
    RequestOutput,
    RequestStarted,
    RequestTimes,
)
from services.inference.engine.request import Request, RequestStatus
from services.inference.engine.scheduler import Scheduler

log = logging.getLogger(__name__)

MAX_RETRY_AFTER = 60.0
"""Seconds."""

StepLog = Callable[[list[ScheduledRequest]], None]


class DeadlinePassedError(TimeoutError):
    """A request's deadline passed before its answer was complete."""


class QueueFullError(RuntimeError):
    """As many requests wait as may. retry_after: seconds, about what the last one that was let in had waited."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(waiting, retry_after)
        self.waiting = waiting
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.waiting} requests wait already; try again in {self.retry_after:.0f} s, or ask another replica"


@dataclass(frozen=True, eq=False, slots=True)
class _Flight:
    """A step that is launched and not read.

    began: the clock's seconds at its launch
    ends: of each request, how many of its tokens are computed after this step; without those whose share counts for
        nothing any more, since they ended or should have gone on from another token
    """

    step: list[ScheduledRequest]
    launched: LaunchedStep
    began: float
    ends: dict[Request, int]


class Engine:
    """Owns the requests from arrival to their last token.

    Where the runner runs ahead, a step is scheduled and launched while the one before it runs, as if each of that one's
    tokens let its request go on, and only then are those tokens read. Lengths are known beforehand. A request that a
    token, a fault or its caller ends while its next row is under way leaves that row behind: nobody looks at what it
    brings. See `LaunchedStep.runs_ahead` for the steps that are read before the next is scheduled.

    clock: monotonic seconds
    step_log: called with every step before it runs, for tests and traces
    moved: whether the last step had anything to run or to read
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        adapters: Adapters,
        clock: Callable[[], float],
        step_log: StepLog | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.adapters = adapters
        self._clock = clock
        self._step_log = step_log
        self._requests: dict[str, Request] = {}
        self._outputs: list[EngineOutput] = []
        self.control = AdapterControl(adapters, clock, self._requests_of, self._give_up, self._tell)
        self._steps = 0
        self._max_adapters_in_step = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._refusals = 0
        self._last_wait = 0.0
        self._flight: _Flight | None = None
        self._read_at = 0.0
        self.moved = False

    @property
    def has_requests(self) -> bool:
        """Whether there is an answer to give, or a step to read."""
        return bool(self._requests) or self._flight is not None

    def add(self, add: AddRequest) -> None:
        """Take a request in; its adapter starts on its way to memory if it is not there."""
        now = self._clock()
        if not self.scheduler.queues.accepts("" if add.adapter is None else add.adapter.digest):
            self._refuse(add)
            return
        request = Request(
            add.request_id,
            add.prompt_token_ids,
            add.sampling,
            add.stopping,
            add.adapter,
            deadline=None if add.timeout is None else now + add.timeout,
            arrival_time=now,
            priority=add.priority,
            cache_salt=add.cache_salt,
        )
        if add.adapter is not None:
            request.arrival_tier = self.adapters.tier(add.adapter)
        self._requests[request.request_id] = request
        self.scheduler.add(request)

    def _refuse(self, add: AddRequest) -> None:
        retry_after = min(MAX_RETRY_AFTER, max(1.0, self._last_wait))
        error = QueueFullError(self.scheduler.queues.num_waiting, retry_after)
        self._outputs.append(RequestOutput(add.request_id, finished=RequestFinished("ERROR", error=error)))
        self._refusals += 1

    def abort(self, request_id: str) -> None:
        """End a request; whatever it holds is free for the next step. Unknown ids are ignored."""
        if (request := self._requests.get(request_id)) is not None:
            self._give_up(request)

    def step(self) -> list[EngineOutput]:
        """Schedule, launch, read, update. Empty-handed when nothing could run."""
        self._expire()
        self._tend_adapters()
        self._bind_adapters()
        before, step = self._flight, self.scheduler.schedule()
        self._flight = self._launch(step) if step else None
        self.scheduler.launched(step)
        if before is not None:
            self._read(before)
        if self._flight is not None and not self._flight.launched.runs_ahead:
            self.settle()
        self.moved = bool(step) or before is not None
        return self.take_outputs()

    def settle(self) -> None:
        """Read the step that is on its way, if one is."""
        if self._flight is not None:
            self._read(self._flight)
            self._flight = None

    def take_outputs(self) -> list[EngineOutput]:
        """What there is to tell since the last time."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def next_deadline(self) -> float | None:
        """Seconds until something is due: a request's deadline, an adapter's; None when nothing is."""
        deadlines = [request.deadline for request in self._requests.values() if request.deadline is not None]
        deadlines += self.control.deadlines()
        due = [max(0.0, min(deadlines) - self._clock())] if deadlines else []
        if (adapters := self.adapters.next_deadline()) is not None:
            due.append(adapters)
        return min(due, default=None)

    def _expire(self) -> None:
        now = self._clock()
        for request in list(self._requests.values()):
            if request.deadline is not None and request.deadline <= now:
                self._give_up(request, DeadlinePassedError("the deadline passed"))

    def _tend_adapters(self) -> None:
        """Take in what became of adapters; end the requests of those that cannot be had, and go on with commands."""
        self.adapters.poll()
        for request in list(self._requests.values()):
            if request.adapter is not None and (failure := self.adapters.failure(request.adapter)) is not None:
                self._give_up(request, failure)
        self.control.advance()

    def _requests_of(self, name: str, version: int | None) -> list[Request]:
        return [
            request
            for request in self._requests.values()
            if request.adapter is not None
            and request.adapter.name == name
            and version in (None, request.adapter.version)
        ]

    def _tell(self, output: EngineOutput) -> None:
        self._outputs.append(output)

    def _bind_adapters(self) -> None:
        """Claim adapters for those who wait for one, and let go those whose adapter has come."""
        for request in list(self.scheduler.queues.arriving):
            if request.adapter is not None:
                request.claimed = request.claimed or self.adapters.try_claim(request.adapter)
                if not request.claimed:
                    continue
                if not self.adapters.is_ready(request.adapter):
                    continue
            request.adapter_ready_time = self._clock()
            self.scheduler.adapter_arrived(request)

    def _record(self, step: list[ScheduledRequest]) -> None:
        now = self._clock()
        self._steps += 1
        distinct = {scheduled.slot for scheduled in step} - {None}
        self._max_adapters_in_step = max(self._max_adapters_in_step, len(distinct))
        for scheduled in step:
            request = scheduled.request
            if request.first_scheduled_time is None:
                request.first_scheduled_time = now
                self._last_wait = now - request.arrival_time
                self._prompt_tokens += len(request.prompt_token_ids)
                self._outputs.append(
                    RequestStarted(request.request_id, request.arrival_tier, request.num_cached_tokens)
                )
        if self._step_log is not None:
            self._step_log(step)

    def _launch(self, step: list[ScheduledRequest]) -> _Flight:
        began = self._clock()
        self._record(step)
        ends = {scheduled.request: scheduled.request.num_computed_tokens + scheduled.num_tokens for scheduled in step}
        return _Flight(step, self.runner.launch(step), began, ends)

    def _read(self, flight: _Flight) -> None:
        for scheduled, sampled in zip(flight.step, flight.launched.read(), strict=True):
            if (end := flight.ends.get(scheduled.request)) is not None:
                self._update(scheduled.request, end, sampled)
        began, self._read_at = max(flight.began, self._read_at), self._clock()
        self.scheduler.took(flight.step, self._read_at - began)

    def _update(self, request: Request, end: int, sampled: SampledToken | None) -> None:
        """end: how many of its tokens are computed, and so the place of the one that was sampled"""
        if sampled is not None and sampled.error is not None:
            self._give_up(request, sampled.error)
            return
        self.scheduler.kv.remember(request, end)
        if sampled is None:
            return
        request.token_ids[end] = sampled.token_id
        if sampled.late:
            self._take_back(request, end)
        self._generation_tokens += 1
        times = None
        if request.first_token_time is None:
            request.first_token_time = self._clock()
            times = self._times(request)
        stopping, count = request.stopping, end + 1 - len(request.prompt_token_ids)
        stopped = sampled.token_id in stopping.stop_token_ids and count > stopping.min_tokens
        finished = None
        if stopped:
            self._end(request, RequestStatus.FINISHED_STOPPED)
            finished = RequestFinished("STOP", stop_token_id=sampled.token_id)
        elif count >= stopping.max_tokens:
            self._end(request, RequestStatus.FINISHED_LENGTH)
            finished = RequestFinished("LENGTH")
        logprobs = () if sampled.logprobs is None else (sampled.logprobs,)
        self._outputs.append(RequestOutput(request.request_id, (sampled.token_id,), logprobs, times, finished))

    def _take_back(self, request: Request, end: int) -> None:
        """A step under way that went on from another token at place `end` counts for nothing; the next computes it."""
        if self._flight is not None and self._flight.ends.get(request, 0) > end:
            del self._flight.ends[request]
            del request.token_ids[end + 1 :]
            request.num_computed_tokens = end

    def _times(self, request: Request) -> RequestTimes:
        assert request.first_scheduled_time is not None and request.first_token_time is not None
        arrival = request.arrival_time
        return RequestTimes(
            queue=request.first_scheduled_time - arrival,
            adapter_load=request.adapter_ready_time - arrival if request.arrival_tier in ("STORE", "DISK") else 0.0,
            ttft=request.first_token_time - arrival,
        )

    def _give_up(self, request: Request, error: Exception | None = None) -> None:
        """End a request without an answer: cancelled, or failed with `error`."""
        self._end(request, RequestStatus.FINISHED_CANCELLED if error is None else RequestStatus.FINISHED_ERROR)
        finished = RequestFinished("CANCELLED" if error is None else "ERROR", error=error)
        self._outputs.append(RequestOutput(request.request_id, finished=finished))

    def _end(self, request: Request, status: RequestStatus) -> None:
        if self._flight is not None:
            self._flight.ends.pop(request, None)
        self.scheduler.finish(request, status)
        if request.claimed and request.adapter is not None:
            self.adapters.unclaim(request.adapter)
            request.claimed = False
        del self._requests[request.request_id]

    def stats(self) -> EngineStats:
        """The engine's truth at this moment."""
        pool = self.scheduler.kv.pool
        states = Counter(request.status for request in self._requests.values())
        asking = [
            (request, request.adapter.digest) for request in self._requests.values() if request.adapter is not None
        ]
        waiting = Counter(digest for request, digest in asking if not request.is_admitted)
        return EngineStats(
            running=states[RequestStatus.RUNNING],
            parked=states[RequestStatus.PARKED],
            waiting=self.scheduler.queues.num_waiting,
            refused=self._refusals,
            blocks=pool.num_blocks - 1,
            blocks_free=pool.num_free,
            block_size=self.scheduler.kv.block_size,
            steps=self._steps,
            preemptions=self.scheduler.preemptions,
            parkings=self.scheduler.parkings,
            prefix_queried_tokens=self.scheduler.kv.queried_tokens,
            prefix_hit_tokens=self.scheduler.kv.hit_tokens,
            slot_evictions=self.adapters.evictions,
            adapter_loads=self.adapters.loads,
            max_adapters_in_step=self._max_adapters_in_step,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            adapters=tuple(self.adapters.list(waiting)),
            requests_by_adapter=Counter(digest for _, digest in asking),
            adapter_transitions=dict(self.adapters.transitions),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every owner's books agree."""
        self.scheduler.check_integrity()
        self.adapters.check_integrity()
        assert set(self._requests.values()) == set(self.scheduler.requests()), "a request is lost"
