"""The whole service over a tiny real model: PEFT's answers, whoever shares the batch and however it is cut."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from services.common.errors import DeadlineExceeded
from tests.assets.random_adapter import make_random_adapter
from tests.assets.tiny_model import make_tiny_llama
from tests.clients import Answer, collect, generate, generate_all, request
from tests.conftest import TINY_BASE, InferenceServer, StoreProcess, inference_config, run_inference, run_store
from tests.inference.http.pair import eventually
from tests.inference.solo import Alone, Stream, assert_said_alone, solo
from tests.parity.oracle import Oracle, assert_same_tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = 32
MAX_MODEL_LEN = 96
BLOCK_BYTES = 2 * 3 * 4 * 16 * 4 * 16
"""Keys and values of 16 tokens of the tiny model in float32."""
EOS = 2
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 8, "target_modules": SEVEN, "std": 0.05},
    "odd-rank": {"r": 13, "lora_alpha": 20, "target_modules": ["o_proj", "gate_proj", "down_proj"], "std": 0.08},
    "rslora": {"r": 32, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "k_proj"], "std": 0.15},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 17, "down_proj": 2},
        "alpha_pattern": {"v_proj": 5},
        "layers_to_transform": [0, 2],
        "std": 0.12,
    },
}


class TinyOracle(Oracle):
    """PEFT and transformers on a Hugging Face directory."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Case:
    """One request, and how it is answered alone."""

    adapter: str
    prompt: list[int]
    expected: Alone


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def message(case: Case, **fields: Any) -> inference_pb2.GenerateRequest:
    return request(case.prompt, adapter=case.adapter, max_tokens=TOKENS, **fields)


@pytest.fixture(scope="module")
def adapter_dirs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_random_adapter(root / name, tiny_model, seed=seed, base_model_name_or_path=TINY_BASE, **shape)
        for seed, (name, shape) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def filled_store(
    tiny_model: Path, adapter_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoreProcess]:
    with run_store(tmp_path_factory.mktemp("tiny") / "store") as process:
        process.register_base(TINY_BASE, (tiny_model / "config.json").read_text())
        for name, directory in adapter_dirs.items():
            process.register(name, directory, TINY_BASE)
        yield process


@pytest.fixture(scope="module", params=["compiled", "torch"])
def serving(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    filled_store: StoreProcess,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., contextlib.AbstractContextManager[InferenceServer]]:
    data_dir = tmp_path_factory.mktemp("replica")

    def start(model: Path = tiny_model, **fields: Any) -> contextlib.AbstractContextManager[InferenceServer]:
        defaults = {
            "http_port": None,
            "max_model_len": MAX_MODEL_LEN,
            "threads": 1,
            "cpu_backend": request.param,
            "served_model_name": TINY_BASE,
            "adapter_store": filled_store.address,
        }
        return run_inference(inference_config(model, data_dir, **(defaults | fields)))

    return start


@pytest.fixture(scope="module")
def server(serving: Callable[..., Any]) -> Iterator[InferenceServer]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def chunked(serving: Callable[..., Any]) -> Iterator[InferenceServer]:
    with serving(max_num_batched_tokens=7, max_num_seqs=5) as running:
        yield running


@pytest.fixture(scope="module")
def cramped(serving: Callable[..., Any]) -> Iterator[InferenceServer]:
    """Eight blocks, where one request may need six; two slots for four adapters."""
    with serving(kv_cache_memory_bytes=9 * BLOCK_BYTES, max_loras=2, max_cpu_loras=3) as running:
        yield running


@pytest.fixture(scope="module")
def cases(server: InferenceServer) -> list[Case]:
    """Each adapter and the base, with prompts of 1 to 60 tokens."""
    lengths = [1, 2, 15, 16, 17, 33, 40, 48, 59, 60]
    found = []
    for seed, (adapter, length) in enumerate(zip(itertools.cycle(["", *ADAPTERS]), lengths, strict=False)):
        asked = request(prompt(seed, length), adapter=adapter, max_tokens=TOKENS)
        found.append(Case(adapter, prompt(seed, length), solo(server, asked)))
    return found


# ---- PEFT is right


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> TinyOracle:
    return TinyOracle(tiny_model)


def test_a_mixed_batch_says_what_peft_says(
    server: InferenceServer, oracle: TinyOracle, cases: list[Case], adapter_dirs: dict[str, Path]
) -> None:
    answers = generate_all(server.address, [message(case) for case in cases])
    changed = 0
    for case, answer in zip(cases, answers, strict=True):
        expected = oracle.generate(case.prompt, TOKENS, adapter_dirs.get(case.adapter))
        assert_same_tokens(answer.token_ids, expected, case.adapter or "base")
        changed += bool(case.adapter) and answer.token_ids != oracle.generate(case.prompt, TOKENS).token_ids
    assert changed == sum(bool(case.adapter) for case in cases), "an adapter changed nothing"
    assert server.stats().max_adapters_in_step >= 2


def test_log_probabilities_are_pefts(
    server: InferenceServer, oracle: TinyOracle, cases: list[Case], adapter_dirs: dict[str, Path]
) -> None:
    for case in cases[2:7]:
        asked = message(case, sampling={"seed": 3, "temperature": 1.5}, output=inference_pb2.OutputParams(logprobs=5))
        with grpc.insecure_channel(server.address) as channel:
            events = collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(asked))
        positions = [position for event in events for position in event.chunk.logprobs]
        ids = [position.chosen.token_id for position in positions]
        logits = oracle.logits([*case.prompt, *ids[:-1]], adapter_dirs.get(case.adapter))
        exact = logits[len(case.prompt) - 1 :].log_softmax(-1)
        assert len(positions) == len(exact) == TOKENS
        for position, row in zip(positions, exact, strict=True):
            assert position.chosen.logprob == pytest.approx(float(row[position.chosen.token_id]), abs=1e-3)
            assert [choice.logprob for choice in position.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-3)
            assert position.top[0].logprob >= position.top[-1].logprob
            assert [choice.token_id for choice in position.top] == sorted(
                (choice.token_id for choice in position.top), key=lambda token: -float(row[token])
            ) or float(row.topk(6).values.diff().abs().min()) < 2e-3


@pytest.mark.parametrize(
    "shape",
    [
        {"shards": 3},
        {"tie_word_embeddings": False, "seed": 5},
        {"tie_word_embeddings": False, "shards": 2, "kv_heads": 8, "seed": 6},
        {"heads": 4, "kv_heads": 1, "head_dim": 32, "rope_theta": 500_000.0, "seed": 7},
    ],
    ids=["sharded", "untied", "untied-sharded-mha", "mqa"],
)
def test_other_shapes_of_model(serving: Callable[..., Any], tmp_path: Path, shape: dict[str, Any]) -> None:
    model = make_tiny_llama(tmp_path / "model", **shape)
    oracle = TinyOracle(model)
    prompts = [prompt(seed, length) for seed, length in enumerate((1, 20, 50))]
    with serving(model, adapter_store=None) as server:
        answers = generate_all(server.address, [request(ids, max_tokens=TOKENS) for ids in prompts])
    for ids, answer in zip(prompts, answers, strict=True):
        assert_same_tokens(answer.token_ids, oracle.generate(ids, TOKENS), str(shape))


def test_shards_are_the_same_model(serving: Callable[..., Any], server: InferenceServer, tmp_path: Path) -> None:
    with serving(make_tiny_llama(tmp_path / "model", shards=4)) as sharded:
        for asked in (request(prompt(1, 30), max_tokens=40), request("x", adapter="rslora", max_tokens=40)):
            assert generate(sharded.address, asked).token_ids == generate(server.address, asked).token_ids


def test_bfloat16(serving: Callable[..., Any], cases: list[Case]) -> None:
    with serving(dtype="bfloat16") as server:
        answers = generate_all(server.address, [message(case) for case in cases])
        again = [generate(server.address, message(case)).token_ids for case in cases]
    assert [len(answer.token_ids) for answer in answers] == [TOKENS] * len(cases)
    for case, answer in zip(cases, answers, strict=True):
        assert answer.token_ids[0] == case.expected.token_ids[0] or case.expected.leads[0] < 0.3
    assert len({tuple(tokens) for tokens in again}) == len(cases)
    if cases[0].expected.exact:
        assert again == [answer.token_ids for answer in answers]


# ---- whoever shares the batch

mixes = st.lists(st.integers(0, 9), min_size=1, max_size=7)
several = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check_mix(server: InferenceServer, cases: list[Case], mix: list[int]) -> None:
    """Every other one asks for its log-probabilities too."""
    wanted = [{}, {"output": inference_pb2.OutputParams(logprobs=0)}]
    messages = [message(cases[index], **wanted[place % 2]) for place, index in enumerate(mix)]
    for index, answer in zip(mix, generate_all(server.address, messages), strict=True):
        case = cases[index]
        assert_said_alone(answer, case.expected, f"{case.adapter or 'base'}, {len(case.prompt)} tokens")


@given(mix=mixes)
@several
def test_an_answer_is_the_same_in_any_company(server: InferenceServer, cases: list[Case], mix: list[int]) -> None:
    check_mix(server, cases, mix)


@given(mix=mixes)
@several
def test_an_answer_is_the_same_in_chunks(chunked: InferenceServer, cases: list[Case], mix: list[int]) -> None:
    check_mix(chunked, cases, mix)
    assert max(sum(step.num_tokens) for step in chunked.steps) <= 7


@given(mix=mixes)
@several
def test_an_answer_is_the_same_in_a_cramped_cache(cramped: InferenceServer, cases: list[Case], mix: list[int]) -> None:
    check_mix(cramped, cases, mix)


def test_an_answer_is_the_same_after_preemption(cramped: InferenceServer, cases: list[Case]) -> None:
    before = cramped.stats().preemptions
    check_mix(cramped, cases, [8, 7, 6, 5, 4, 3, 2, 9])
    stats = cramped.stats()
    assert stats.preemptions > before
    assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks)


def test_seeded_answers_are_the_same_everywhere(
    server: InferenceServer, chunked: InferenceServer, cramped: InferenceServer, cases: list[Case]
) -> None:
    kinds: list[dict[str, Any]] = [{}, {"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.02, "temperature": 1.5}]
    messages = [message(case, sampling={"seed": seed} | kinds[seed % 4]) for seed, case in enumerate(cases)]
    alone = [generate(server.address, asked).token_ids for asked in messages]
    before = cramped.stats().preemptions
    for where in (server, chunked, cramped):
        assert [answer.token_ids for answer in generate_all(where.address, messages)] == alone
    assert cramped.stats().preemptions > before
    assert alone != [case.expected.token_ids for case in cases]


def test_seeds_that_differ(server: InferenceServer) -> None:
    answers = {tuple(generate(server.address, request("x", sampling={"seed": seed})).token_ids) for seed in range(10)}
    assert len(answers) == 10


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}, {"temperature": 0.0}, {"top_p": 1e-6}], ids=str)
def test_narrowed_to_the_best_it_is_greedy(server: InferenceServer, cases: list[Case], narrow: dict[str, Any]) -> None:
    for case in cases[:4]:
        answer = generate(server.address, message(case, sampling={"seed": 9} | narrow))
        assert_said_alone(answer, case.expected, str(narrow))


# ---- where it ends


def always(token: int) -> dict[str, Any]:
    return {"temperature": 0.0, "logit_bias": {token: 100.0}}


def ending(answer: Answer) -> tuple[str, str, int]:
    reason = inference_pb2.FinishReason.Name(answer.finished.reason).removeprefix("FINISH_REASON_")
    return reason, answer.finished.stop_match, answer.finished.usage.completion_tokens


def test_the_end_of_sequence(server: InferenceServer) -> None:
    ended = generate(server.address, request("x", ignore_eos=False, sampling=always(EOS)))
    assert (ending(ended), ended.text, ended.token_ids) == (("STOP", "<|im_end|>", 1), "", [EOS])
    ignored = generate(server.address, request("x", max_tokens=5, sampling=always(EOS)))
    assert (ending(ignored), ignored.token_ids) == (("LENGTH", "", 5), [EOS] * 5)


def test_min_tokens_come_before_any_end(server: InferenceServer) -> None:
    asked = request("x", ignore_eos=False, sampling=always(EOS), stopping={"min_tokens": 3})
    answer = generate(server.address, asked)
    assert ending(answer) == ("STOP", "<|im_end|>", 4)
    assert EOS not in answer.token_ids[:3]


@pytest.mark.parametrize("include_stop", [False, True])
def test_stop_ids(server: InferenceServer, include_stop: bool) -> None:
    token = 40
    text = server.serving.tokenizer.token_text(token)
    stopping = {"stop_token_ids": [7, token], "include_stop": include_stop}
    answer = generate(server.address, request("x", sampling=always(token), stopping=stopping))
    assert (ending(answer), answer.text) == (("STOP", text, 1), text if include_stop else "")


@pytest.fixture(scope="module")
def story(server: InferenceServer) -> Answer:
    """A long answer without stop texts; every cut of it is one that the model says again."""
    return generate(server.address, request("The harbour was", max_tokens=60))


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize("length", [1, 3, 8, 25])
def test_stop_texts_end_the_answer_where_they_begin(
    server: InferenceServer, story: Answer, include_stop: bool, length: int
) -> None:
    """Cut at every seventh character, so that they begin and end inside tokens and across them."""
    for start in range(5, len(story.text) // 2, 7):
        stop = story.text[start : start + length]
        if "\ufffd" in stop:
            continue
        asked = request("The harbour was", max_tokens=60, stopping={"stop": ["never said", stop]})
        asked.stopping.include_stop = include_stop
        with Stream.running(server.address, [asked]) as [stream]:
            stream.rest()
        pieces = [event.chunk.text for event in stream.events if event.HasField("chunk")]
        end = story.text.index(stop) + (len(stop) if include_stop else 0)
        assert "".join(pieces) == story.text[:end]
        finished = stream.events[-1].finished
        assert (finished.reason, finished.stop_match) == (inference_pb2.FINISH_REASON_STOP, stop)
        ids = [token for event in stream.events for token in event.chunk.token_ids]
        assert finished.usage.completion_tokens == len(ids)
        assert ids == story.token_ids[: len(ids)]
    eventually(lambda: server.stats().running == 0)


def test_an_answer_may_reach_the_models_length(server: InferenceServer) -> None:
    for asked in (50, None):
        message = request(prompt(1, MAX_MODEL_LEN - 6), max_tokens=50)
        if asked is None:
            message.stopping.ClearField("max_tokens")
        assert ending(generate(server.address, message)) == ("LENGTH", "", 6)
    assert ending(generate(server.address, request(prompt(1, MAX_MODEL_LEN - 1)))) == ("LENGTH", "", 1)


# ---- how it streams


@pytest.mark.parametrize("interval", [1, 2, 7, 1000])
def test_chunks_make_the_answer(server: InferenceServer, interval: int) -> None:
    """Hot enough that single bytes of characters come, in the wrong order too."""
    for seed in range(6):
        sampling = {"seed": seed, "temperature": 3.0}
        output = inference_pb2.OutputParams(stream_interval=interval, logprobs=0)
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            events = collect(stub.Generate(request("é", max_tokens=40, sampling=sampling, output=output)))
        chunks = [event.chunk for event in events if event.HasField("chunk")]
        ids = [token for chunk in chunks for token in chunk.token_ids]
        assert ids == generate(server.address, request("é", max_tokens=40, sampling=sampling)).token_ids
        text = "".join(chunk.text for chunk in chunks)
        assert text == server.serving.tokenizer.decode(ids, skip_special_tokens=True)
        sizes = [len(chunk.token_ids) for chunk in chunks]
        assert all(size >= interval for size in sizes[:-1]), "tokens are gathered; what waited comes along"
        assert [len(chunk.logprobs) for chunk in chunks] == sizes


# ---- who gives up


def test_a_request_given_up_frees_blocks_and_slot(server: InferenceServer) -> None:
    asked = request("x", adapter="all-linear", max_tokens=90)
    with Stream.running(server.address, [asked] * 3) as streams:
        for stream in streams:
            stream.call.cancel()
        eventually(lambda: server.stats().running == server.stats().waiting == 0)
    stats = server.stats()
    assert stats.blocks_free == stats.blocks
    assert all(adapter.references == 0 for adapter in stats.adapters)


def test_a_deadline_passes(serving: Callable[..., Any]) -> None:
    """The model answers for longer than the caller waits, however fast this machine is."""
    with serving(max_model_len=2048) as server:
        with pytest.raises(DeadlineExceeded):
            generate(server.address, request("x", adapter="rslora", max_tokens=2000), timeout=0.3)
        eventually(lambda: server.stats().running == server.stats().waiting == 0)
        stats = server.stats()
        assert stats.blocks_free == stats.blocks
        assert stats.generation_tokens < 2000
        assert all(adapter.references == 0 for adapter in stats.adapters)
