"""The GPU's runner on a CPU, graphs off: buckets, fixed buffers and padding give the torch runner's tokens."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import MultiloraError
from services.common.memory_plan import decode_buckets
from services.common.profile import linear_shapes
from services.inference.adapters.packed_adapter import BaseModelShapes
from services.inference.adapters.slot_pool import SlotPool
from services.inference.config import SchedulerConfig
from services.inference.engine.engine import Engine
from services.inference.engine.interfaces import LaunchedStep, Runner, SampledToken, ScheduledRequest
from services.inference.engine.messages import AddRequest, RequestFinished, RequestOutput
from services.inference.engine.request import Request, SamplingParams, StoppingParams
from services.inference.engine.scheduler import Scheduler
from services.inference.model.attention import KVCache
from services.inference.model.config import ModelConfig, load_config
from services.inference.model.decoder import Decoder
from services.inference.model.gpu_runner import Capture, Forward, GpuRunner, StepLogits
from services.inference.model.lora import LoraLayer, group_shapes
from services.inference.model.runner import ModelRunner
from services.inference.model.sampler import Sampler
from services.inference.model.weights import load_weights
from services.inference.model.widest_step import EmptyAdapter
from tests.inference.adapters.lanes import HeldLanes
from tests.inference.adapters.packs import make_pack
from tests.inference.engine.simulation import MemoryAdapters, adapter_version

BLOCK_SIZE, BLOCKS_EACH, MAX_LEN = 16, 4, 64
MOST = 6
VERSIONS = [adapter_version(f"of-slot-{slot}") for slot in range(3)]
SLOTS = (None, 0, 1, 2, None, 0, 1, 2)
PROMPTS = [[3 + (7 * index * (seed + 1)) % 500 for index in range(5 + 4 * seed)] for seed in range(len(SLOTS))]


@dataclass
class Model:
    """Two runners' shared base and adapters; each runner has a cache of its own."""

    config: ModelConfig
    decoder: Decoder
    pool: SlotPool

    def cache(self) -> KVCache:
        config = self.config
        blocks = 1 + BLOCKS_EACH * len(SLOTS)
        return KVCache(config.num_layers, blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim, config.dtype)

    def torch_runner(self) -> Runner:
        return ModelRunner(self.decoder, self.cache(), self.pool, Sampler())

    def gpu_runner(self, capture: Capture | None = None) -> GpuRunner:
        return GpuRunner(self.decoder, self.cache(), self.pool, Sampler(), max_num_seqs=MOST, capture=capture)


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    config = load_config(tiny_model, max_model_len=MAX_LEN)
    pool = SlotPool(group_shapes(config), config.num_layers, 3, 32, config.dtype)
    hf_config = json.loads((tiny_model / "config.json").read_text())
    base = BaseModelShapes(linear_shapes(hf_config), 32, config.dtype)
    directory = tmp_path_factory.mktemp("adapters")
    for name, rank in (("one", 5), ("two", 16), ("three", 32)):
        pool.load(make_pack(directory, name, config=hf_config, r=rank, seed=rank, std=0.08).adapter(base))
    return Model(config, Decoder(config, load_weights(tiny_model, config)), pool)


class Requests:
    """Requests as an engine would hold them, computed by one runner."""

    def __init__(self, runner: Runner, sampling: Callable[[int], SamplingParams] = lambda _: SamplingParams()) -> None:
        self._runner = runner
        self.all = [
            Request(str(index), list(prompt), sampling(index), StoppingParams(max_tokens=40))
            for index, prompt in enumerate(PROMPTS)
        ]
        for index, request in enumerate(self.all):
            request.block_ids = list(range(1 + index * BLOCKS_EACH, 1 + (index + 1) * BLOCKS_EACH))

    def step(self, shares: Sequence[tuple[int, int]]) -> list[SampledToken | None]:
        """shares: (request, most tokens of it)"""
        step = [
            ScheduledRequest(self.all[index], min(most, self.all[index].num_uncomputed_tokens), SLOTS[index])
            for index, most in shares
        ]
        tokens = self._runner.launch(step).read()
        for scheduled, token in zip(step, tokens, strict=True):
            assert (token is not None) == scheduled.samples
            scheduled.request.num_computed_tokens += scheduled.num_tokens
            if token is not None:
                scheduled.request.token_ids.append(token.token_id)
        return tokens


def said(tokens: Sequence[SampledToken | None]) -> list[tuple[int, tuple[int, ...]] | None]:
    """Each token, and the best ones where they were asked for; sums of two runners differ in their last bits."""
    return [token and (token.token_id, token.logprobs.top_ids if token.logprobs else ()) for token in tokens]


SHARE = st.tuples(st.integers(0, len(SLOTS) - 1), st.integers(1, 40))
SHARES = st.lists(st.lists(SHARE, min_size=1, unique_by=lambda share: share[0]), min_size=1, max_size=8)


@given(steps=SHARES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_steps_give_the_torch_runners_tokens(model: Model, steps: list[list[tuple[int, int]]]) -> None:
    """Chunks of prompts, decode and both at once; adapters in any mix; more requests than the largest bucket."""
    ours, theirs = Requests(model.gpu_runner()), Requests(model.torch_runner())
    for shares in steps:
        assert said(ours.step(shares)) == said(theirs.step(shares))


def test_a_bucket_serves_mixes_one_after_the_other(model: Model) -> None:
    """Nothing of a fuller step is left in the buffers of the next."""
    ours, theirs = Requests(model.gpu_runner()), Requests(model.torch_runner())
    everyone = [(index, 40) for index in range(len(SLOTS))]
    decoding = [everyone[:6], everyone[3:6], everyone[4:5], everyone[1:4], everyone[:1], everyone[2:7], everyone]
    for shares in [everyone, *decoding]:
        assert said(ours.step(shares)) == said(theirs.step(shares))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 2.0, "top_k": 300},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "logprobs": 3},
        {"logit_bias": {7: 4.0}},
    ],
    ids=str,
)
def test_draws_are_the_hosts(model: Model, sampling: dict[str, Any]) -> None:
    """Beside greedy neighbours: the same seed and place in the answer, the same token."""

    def of(index: int) -> SamplingParams:
        return SamplingParams(**sampling, seed=index) if index % 2 else SamplingParams()

    ours, theirs = Requests(model.gpu_runner(), of), Requests(model.torch_runner(), of)
    everyone = [(index, 40) for index in range(MOST)]
    for _ in range(6):
        assert said(ours.step(everyone)) == said(theirs.step(everyone))


def test_a_step_without_adapters_replays_what_was_captured(model: Model) -> None:
    """A captured pass is called again over the same buffers, never built anew."""
    replays = []

    def capture(forward: Forward) -> Forward:
        def replay() -> StepLogits:
            replays.append(forward)
            return forward()

        return replay

    ours, theirs = Requests(model.gpu_runner(capture)), Requests(model.torch_runner())
    base = [(index, 40) for index, slot in enumerate(SLOTS) if slot is None]
    for _ in range(4):
        assert said(ours.step(base)) == said(theirs.step(base))
    assert len(replays) == 3 and len(set(replays)) == 1


def test_a_capture_that_fails_runs_eagerly_and_is_said_once(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    def capture(_forward: Forward) -> Forward:
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        runner = model.gpu_runner(capture)
    assert runner.capture_failures == 2 * len(decode_buckets(MOST))
    assert len(caplog.records) == 1 and "not permitted" in caplog.text
    ours, theirs = Requests(runner), Requests(model.torch_runner())
    everyone = [(index, 40) for index in range(MOST)]
    for _ in range(3):
        assert said(ours.step(everyone)) == said(theirs.step(everyone))


def test_eager_steps_follow_a_copy_layer_by_layer_and_graphs_wait_for_its_end(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is launched between two waits is a layer's; the base's steps wait for nobody."""
    config, lanes, order = model.config, HeldLanes(), list[str]()
    pool = SlotPool(group_shapes(config), config.num_layers, 3, 32, config.dtype, lanes=lanes)

    def replayed(forward: Forward) -> Forward:
        return lambda: (order.append("graph"), forward())[1]

    requests = Requests(replace(model, pool=pool).gpu_runner(replayed))
    lanes.waits = order
    pool.load(EmptyAdapter("empty", 8))
    monkeypatch.setattr(LoraLayer, "add", lambda _self, group, y, _x: (order.append(group), y)[1])
    requests.step([(0, 40), (4, 40)])
    groups = ["qkv", "o", "gate_up", "down"]
    assert order == groups * config.num_layers
    order.clear()
    requests.step([(1, 40)])
    arrivals = [f"scatter {layer + 1}" for layer in range(config.num_layers)]
    assert order == [each for arrival in arrivals for each in (arrival, *groups)]
    order.clear()
    requests.step([(1, 40), (0, 40)])
    assert order[:2] == [arrivals[-1], "graph"]


@pytest.fixture
def overflowing(model: Model) -> Iterator[None]:
    """The adapter in slot 1 makes its rows inf."""
    scales = model.pool.weights[0]["qkv"].scales
    before = scales[:, 1].clone()
    scales[:, 1] = math.inf
    yield
    scales[:, 1] = before


@pytest.mark.usefixtures("overflowing")
def test_logits_that_are_not_finite_end_their_request_alone(model: Model) -> None:
    def of(index: int) -> SamplingParams:
        return SamplingParams(temperature=float(index % 2), seed=index)

    ours = Requests(model.gpu_runner(), of)
    everyone = [(index, 40) for index in range(MOST)]
    tokens = ours.step(everyone)
    failed = [index for index, token in enumerate(tokens) if token is not None and token.error is not None]
    assert failed == [index for index in range(MOST) if SLOTS[index] == 1]
    error = tokens[failed[0]].error  # type: ignore[union-attr]
    assert isinstance(error, MultiloraError) and error.reason == "NON_FINITE_LOGITS"


# ---- in an engine, which reads a step when the next is launched


class Recording:
    """A runner, and what was asked of it in which order: launches and reads, by number."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._launched = itertools.count()
        self.log: list[tuple[str, int]] = []

    def launch(self, step: Sequence[ScheduledRequest]) -> LaunchedStep:
        number = next(self._launched)
        self.log.append(("launch", number))
        return RecordedStep(self, number, self._runner.launch(step))


@dataclass(frozen=True)
class RecordedStep:
    recording: Recording
    number: int
    step: LaunchedStep

    @property
    def runs_ahead(self) -> bool:
        return self.step.runs_ahead

    def read(self) -> list[SampledToken | None]:
        self.recording.log.append(("read", self.number))
        return self.step.read()


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    top_ids: list[tuple[int, ...]] = field(default_factory=list)
    finished: RequestFinished | None = None


def engine_of(runner: Runner) -> Engine:
    config = SchedulerConfig(
        max_model_len=MAX_LEN,
        num_blocks=1 + BLOCKS_EACH * len(SLOTS),
        max_num_seqs=MOST,
        max_num_batched_tokens=24,
        block_size=BLOCK_SIZE,
    )
    adapters = MemoryAdapters(claims=3, slots=3)
    adapters.slots = [version.digest for version in VERSIONS]
    adapters.in_memory = {version.digest: None for version in VERSIONS}
    return Engine(Scheduler(config, adapters), runner, adapters, time.monotonic)


def answers(engine: Engine, requests: Sequence[AddRequest], *, every: int = 2) -> dict[str, Answer]:
    """One comes every so many steps."""
    found: dict[str, Answer] = {request.request_id: Answer() for request in requests}
    for step in itertools.count():
        if step % every == 0 and step // every < len(requests):
            engine.add(requests[step // every])
        for output in engine.step():
            if isinstance(output, RequestOutput):
                answer = found[output.request_id]
                assert answer.finished is None, "a word after the last word"
                answer.tokens += output.token_ids
                answer.top_ids += [each.top_ids for each in output.logprobs]
                answer.finished = output.finished
        engine.scheduler.check_integrity()
        if not engine.has_requests:
            return found
    raise AssertionError


def asked(
    sampling: Callable[[int], SamplingParams] = lambda _: SamplingParams(),
    stops: Callable[[int], frozenset[int]] = lambda _: frozenset(),
) -> list[AddRequest]:
    return [
        AddRequest(
            str(index),
            list(PROMPTS[index]),
            sampling(index),
            StoppingParams(4 + 3 * index, stop_token_ids=stops(index)),
            None if slot is None else VERSIONS[slot],
        )
        for index, slot in enumerate(SLOTS)
    ]


def test_the_next_step_is_launched_before_this_one_is_read(model: Model) -> None:
    """And none is launched past the last token, or beside a step that has to be read first."""
    for sampling, log in (
        (SamplingParams(), ["launch 0", "launch 1", "read 0", "launch 2", "read 1", "launch 3", "read 2", "read 3"]),
        (SamplingParams(logprobs=1), [f"{what} {number}" for number in range(4) for what in ("launch", "read")]),
    ):
        recording = Recording(model.gpu_runner())
        engine = engine_of(recording)
        answers(engine, asked(lambda _: sampling)[:1])  # noqa: B023 -- called here
        assert [f"{what} {number}" for what, number in recording.log] == log
        assert engine.stats().parkings == 0


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 2.0, "top_k": 300},  # always beyond what the device looks at: each token comes late
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "logprobs": 3},
    ],
    ids=str,
)
def test_an_engine_that_runs_ahead_gives_the_same_answers(model: Model, sampling: dict[str, Any]) -> None:
    """As the torch runner, whose steps are read before the next; stops come when the next row is under way."""

    def of(index: int) -> SamplingParams:
        return SamplingParams(**sampling, seed=index) if index % 3 else SamplingParams()

    unstopped = answers(engine_of(model.torch_runner()), asked(of))
    stops = {int(name): frozenset(answer.tokens[2:3]) for name, answer in unstopped.items() if int(name) % 2}
    requests = asked(of, lambda index: stops.get(index, frozenset()))
    ours = answers(engine_of(recording := Recording(model.gpu_runner())), requests)
    assert ours == answers(engine_of(model.torch_runner()), requests)
    assert {answer.finished.reason for answer in ours.values() if answer.finished} == {"STOP", "LENGTH"}
    assert any(before[0] == after[0] == "launch" for before, after in itertools.pairwise(recording.log))


@pytest.mark.usefixtures("overflowing")
def test_a_row_that_fails_leaves_its_next_one_behind(model: Model) -> None:
    ours = answers(engine_of(model.gpu_runner()), asked(), every=1)
    theirs = answers(engine_of(model.torch_runner()), asked(), every=1)
    for index, slot in enumerate(SLOTS):
        mine, other = ours[str(index)], theirs[str(index)]
        assert mine.finished is not None and other.finished is not None
        assert (mine.tokens, mine.finished.reason) == (other.tokens, other.finished.reason)
        assert (mine.finished.reason == "ERROR") == (slot == 1)


def test_buckets_reach_the_most_and_waste_little() -> None:
    assert decode_buckets(1) == [1]
    assert decode_buckets(6) == [1, 2, 4, 6]
    buckets = decode_buckets(256)
    assert buckets[-1] == 256 and len(buckets) < 32
    assert all(after <= 2 * before for before, after in itertools.pairwise(buckets))
