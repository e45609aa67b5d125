"""The whole engine on a real model, under any order of what requests, operators, the store and time do to it.

Requests come and go, with adapters and without, while adapters are fetched, parked, evicted, loaded, pinned, unloaded
and deleted, aliases move, fetches break, and KV blocks run out. After each step every owner's books agree. Each answer
is, token for token and bit for bit of its log-probabilities, the one that the same request gets with an engine of its
own: on the compiled path, whose rows are bitwise independent of their batch; with a runner that is read before the next
step, and with one that runs ahead.

`MULTILORA_ENGINE_EXAMPLES=1000` makes a long run of it (`make test-engine-long`).
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from lora_kernels.cpu import UnavailableError, load_library
from services.common.errors import MultiloraError, Unavailable
from services.inference.adapters import failures
from services.inference.config import SchedulerConfig, ServerConfig
from services.inference.engine.engine import DeadlinePassedError, Engine
from services.inference.engine.messages import (
    AddRequest,
    EngineOutput,
    LoadAdapter,
    RequestFinished,
    RequestOutput,
    UnloadAdapter,
    UnpinAdapter,
)
from services.inference.engine.request import SamplingParams, StoppingParams
from services.inference.engine.scheduler import Scheduler
from services.inference.model.backend import build_runner
from services.inference.model.config import load_config
from services.inference.model.sampler import Sampler
from tests.assets.tiny_model import make_tiny_llama
from tests.inference.adapters.packs import ALL, CONFIG, make_pack
from tests.inference.adapters.test_manager import Bench, make_bench
from tests.inference.adapters.test_manager_machine import Workers
from tests.inference.engine.ahead import RunningAhead

EXAMPLES = int(os.environ.get("MULTILORA_ENGINE_EXAMPLES", "0"))
SEED = 2
"""Of histories in which everything happens; not derandomized, which would draw others at every edit of this file."""
BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 16, 9, 64
# What a client names: an alias, and the versions that it moves between; two tenants.
ALIASES = {"a/x": ("x-1", "x-2"), "a/y": ("y-1", "y-2"), "b/z": ("z-1", "z-2")}
SHAPES = {"x-1": 3, "x-2": 16, "y-1": 17, "y-2": 8, "z-1": 40, "z-2": 1}
# Few, so that beginnings are shared.
PROMPTS = tuple(
    tuple(3 + (7 * number + 5 * (at if at >= 9 else 0) + at * at) % 500 for at in range(length))
    for number, length in ((0, 1), (1, 9), (1, 20), (1, 37), (2, 5), (2, 34))
)


@dataclass
class Sent:
    add: AddRequest
    pack: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: RequestFinished | None = None
    aborted: bool = False


class World:
    """The model, its adapters' packs, and what each request is answered alone."""

    def __init__(self, directory: Path) -> None:
        self.model = make_tiny_llama(
            directory / "model",
            hidden_size=CONFIG["hidden_size"],
            intermediate_size=CONFIG["intermediate_size"],
            layers=CONFIG["num_hidden_layers"],
            heads=CONFIG["num_attention_heads"],
            kv_heads=CONFIG["num_key_value_heads"],
            head_dim=CONFIG["head_dim"],
            std=0.3,
        )
        self.packs = {
            name: make_pack(directory, name, seed=seed, r=rank, target_modules=ALL, std=0.3)
            for seed, (name, rank) in enumerate(SHAPES.items())
        }
        self.met: Counter[str] = Counter()
        self._alone: dict[tuple[str, tuple[int, ...]], tuple[list[int], list[float]]] = {}

    def engine(self, bench: Bench, *, num_blocks: int = NUM_BLOCKS, runs_ahead: bool = False, **limits: int) -> Engine:
        config = ServerConfig(
            model=self.model, dtype="float32", block_size=BLOCK_SIZE, cpu_backend="compiled", threads=1
        )
        model = load_config(self.model, dtype="float32", max_model_len=MAX_MODEL_LEN)
        scheduling = SchedulerConfig(
            max_model_len=MAX_MODEL_LEN,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            **({"max_num_seqs": 6, "max_num_batched_tokens": 16, "turn_tokens": 4} | limits),
        )
        runner = build_runner(config, model, num_blocks, bench.pool, Sampler())
        if runs_ahead:
            runner = RunningAhead(runner, is_late=lambda _request, token: token % 8 == 0)
        return Engine(Scheduler(scheduling, bench.manager), runner, bench.manager, bench.clock)

    def alone(self, pack: str, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
        """All it could say and its log-probabilities, with an engine, a slot pool and a KV cache of its own."""
        if (pack, prompt) not in self._alone:
            with tempfile.TemporaryDirectory() as directory:
                bench = make_bench(self.packs, Path(directory))
                engine = self.engine(bench)
                adapter = self.packs[pack].version if pack else None
                stopping = StoppingParams(MAX_MODEL_LEN - len(prompt))
                engine.add(AddRequest("alone", list(prompt), SamplingParams(logprobs=0), stopping, adapter))
                tokens: list[int] = []
                logprobs: list[float] = []
                while engine.has_requests:
                    for output in engine.step():
                        if isinstance(output, RequestOutput):
                            tokens += output.token_ids
                            logprobs += [position.chosen for position in output.logprobs]
                bench.manager.close()
            self._alone[pack, prompt] = tokens, logprobs
        return self._alone[pack, prompt]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    try:
        load_library()
    except UnavailableError as error:
        pytest.skip(f"only the compiled path's answers are the same in every batch: {error}")
    return World(tmp_path_factory.mktemp("world"))


def machine(world: World, *, runs_ahead: bool) -> type[RuleBasedStateMachine]:
    names, packs = st.sampled_from(sorted(ALIASES)), st.sampled_from(sorted(SHAPES))

    class WholeEngine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.directory = tempfile.TemporaryDirectory()
            self.bench = make_bench(world.packs, Path(self.directory.name), max_loras=2, max_cpu_loras=4, idle_ttl=20.0)
            self.workers = self.bench.manager._fetcher._workers = Workers()  # type: ignore[assignment]
            self.engine = world.engine(self.bench, runs_ahead=runs_ahead)
            self.sent: dict[str, Sent] = {}
            self.points_to = {alias: versions[0] for alias, versions in ALIASES.items()}
            self.replies = itertools.count()
            self.faults = False
            self.cut_off: set[str] = (
                set()
            )  # packs whose requests an unload may have cancelled; the face hides their names

        @rule(
            prompt=st.sampled_from(PROMPTS),
            most=st.integers(1, 24),
            alias=st.sampled_from([None, *sorted(ALIASES)]),
            priority=st.sampled_from([0, 0, 0, 2]),
            salt=st.sampled_from(["", "", "other"]),
            timeout=st.sampled_from([None, None, None, None, 5.0]),
            stops_at=st.sampled_from([None, None, 0, 2, 7]),
        )
        def add(
            self,
            prompt: tuple[int, ...],
            most: int,
            alias: str | None,
            priority: int,
            salt: str,
            timeout: float | None,
            stops_at: int | None,
        ) -> None:
            pack = self.points_to[alias] if alias else ""
            stops = frozenset() if stops_at is None else frozenset({world.alone(pack, prompt)[0][stops_at]})
            add = AddRequest(
                f"r{len(self.sent)}",
                list(prompt),
                SamplingParams(logprobs=0 if len(self.sent) % 2 else None),
                StoppingParams(min(most, MAX_MODEL_LEN - len(prompt)), stop_token_ids=stops),
                world.packs[pack].version if pack else None,
                timeout,
                priority,
                salt,
            )
            self.sent[add.request_id] = Sent(add, pack)
            self.engine.add(add)

        @rule(times=st.integers(1, 8))
        def step(self, times: int) -> None:
            for _ in range(times):
                self.take(self.engine.step())
                self.engine.check_integrity()

        @precondition(lambda self: self.sent)
        @rule(data=st.data())
        def cancel(self, data: st.DataObject) -> None:
            sent = data.draw(st.sampled_from(list(self.sent.values())))
            sent.aborted = True
            self.engine.abort(sent.add.request_id)

        @rule(alias=names, data=st.data())
        def an_alias_moves(self, alias: str, data: st.DataObject) -> None:
            self.points_to[alias] = data.draw(st.sampled_from(ALIASES[alias]))

        @rule(data=st.data(), fault=st.sampled_from([None, None, None, Unavailable("AWAY", "gone"), OSError("broken")]))
        def a_fetch_ends(self, data: st.DataObject, fault: Exception | None) -> None:
            if self.workers.jobs:
                job = self.workers.jobs.pop(data.draw(st.integers(0, len(self.workers.jobs) - 1)))
                self.faults |= fault is not None
                self.bench.puller.errors = [] if fault is None else [fault]
                job()
                self.bench.puller.errors = []

        @rule()
        def every_fetch_ends(self) -> None:
            while self.workers.jobs:
                self.workers.jobs.pop()()

        @rule(pack=packs)
        def prefetch(self, pack: str) -> None:
            self.bench.manager.prefetch(world.packs[pack].version)

        @rule(pack=packs, pin=st.sampled_from([False, False, True]))
        def load(self, pack: str, pin: bool) -> None:
            self.engine.control.handle(LoadAdapter(next(self.replies), world.packs[pack].version, pin))

        @rule(pack=packs)
        def unpin(self, pack: str) -> None:
            self.engine.control.handle(UnpinAdapter(next(self.replies), world.packs[pack].version))

        @rule(pack=packs, timeout=st.sampled_from([None, None, 0.0, 3.0]))
        def unload(self, pack: str, timeout: float | None) -> None:
            version = world.packs[pack].version
            if timeout is not None:
                self.cut_off.add(pack)
            self.engine.control.handle(UnloadAdapter(next(self.replies), version.name, version.version, timeout))

        @rule(pack=packs)
        def a_version_is_deleted(self, pack: str) -> None:
            version = world.packs[pack].version
            self.bench.manager.drop(version.name, version.version)

        @rule(seconds=st.sampled_from([0.05, 2.0, 30.0]))
        def time_passes(self, seconds: float) -> None:
            self.bench.clock.now += seconds

        @invariant()
        def books_agree(self) -> None:
            self.engine.check_integrity()

        def take(self, outputs: list[EngineOutput]) -> None:
            for output in outputs:
                if not isinstance(output, RequestOutput):
                    continue
                sent = self.sent[output.request_id]
                assert sent.finished is None, "a word after the last word"
                sent.tokens += output.token_ids
                sent.logprobs += [position.chosen for position in output.logprobs]
                tokens, logprobs = world.alone(sent.pack, tuple(sent.add.prompt_token_ids))
                assert sent.tokens == tokens[: len(sent.tokens)], f"{sent.pack or 'base'} says what it would not alone"
                assert sent.logprobs == logprobs[: len(sent.logprobs)], f"{sent.pack or 'base'}: other bits than alone"
                if output.finished is not None:
                    sent.finished = output.finished
                    self.check_end(sent, output.finished)

        def check_end(self, sent: Sent, finished: RequestFinished) -> None:
            stopping = sent.add.stopping
            stopped = [token for token in sent.tokens if token in stopping.stop_token_ids]
            assert stopped == ([sent.tokens[-1]] if finished.reason == "STOP" else [])
            match finished.reason:
                case "STOP":
                    assert finished.stop_token_id == sent.tokens[-1]
                case "LENGTH":
                    assert len(sent.tokens) == stopping.max_tokens
                case "CANCELLED":
                    assert sent.aborted or sent.pack in self.cut_off
                case _:
                    late = isinstance(finished.error, DeadlinePassedError) and sent.add.timeout is not None
                    failed = isinstance(finished.error, MultiloraError) and bool(sent.pack) and self.faults
                    assert late or failed, finished

        def teardown(self) -> None:
            for pack in SHAPES:  # a pin may hold the memory that somebody waits for, a drain the adapter
                self.unpin(pack)
            for steps in itertools.count():
                self.every_fetch_ends()
                self.take(self.engine.step())
                self.engine.check_integrity()
                if not self.engine.has_requests:
                    break
                if not self.engine.moved:
                    self.bench.clock.now += 0.05 if steps % 50 else failures.LAST_REST
                assert steps < 3000, "requests wait for ever"
            assert all(sent.finished is not None for sent in self.sent.values()), "a request was lost"
            stats = self.engine.stats()
            world.met.update(
                parkings=stats.parkings,
                preemptions=stats.preemptions,
                evictions=stats.slot_evictions,
                prefix_hits=stats.prefix_hit_tokens,
                **Counter(sent.finished.reason for sent in self.sent.values() if sent.finished is not None),
            )
            self.bench.manager.close()
            self.directory.cleanup()

    return WholeEngine


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_any_order_of_everything(world: World, runs_ahead: bool) -> None:
    world.met.clear()
    histories = machine(world, runs_ahead=runs_ahead)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        histories if EXAMPLES else seed(SEED)(histories),
        settings=settings(
            max_examples=EXAMPLES or 40,
            stateful_step_count=50,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    everything = ("parkings", "preemptions", "evictions", "prefix_hits", "STOP", "LENGTH", "CANCELLED", "ERROR")
    assert all(world.met[each] for each in everything), f"the histories were tame: {world.met}"
