"""Every wrong request gets a code, a reason and the name of what is wrong in it; then the service answers as before."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from torch import Tensor

from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    MultiloraError,
    NotFound,
    Unimplemented,
)
from services.inference.engine.interfaces import SampledToken
from services.inference.engine.request import Request
from services.inference.model.sampler import GreedyRows, Sampler
from tests.assets.random_adapter import make_random_adapter
from tests.assets.tiny_model import make_tiny_llama
from tests.clients import collect, failure, generate, request
from tests.conftest import TINY_BASE, InferenceServer, StoreProcess, inference_config, run_inference, run_store
from tests.inference.solo import Stream

MAX_MODEL_LEN = 64
NAN, INF = float("nan"), float("inf")
LONG = "x" * 200


@dataclass(frozen=True)
class Case:
    """A wrong request, and what it is told. says: what the message must name, beside the field."""

    kind: type[MultiloraError]
    reason: str
    field: str
    fields: dict[str, Any]
    prompt: Any = "hello"
    says: tuple[str, ...] = ()


def sampling(name: str, value: Any) -> Case:
    path = f"sampling.{name}"
    return Case(InvalidArgument, "INVALID_PARAMETER", path, {"sampling": {name: value}}, says=("must be",))


def not_yet(name: str, **fields: Any) -> Case:
    return Case(Unimplemented, "NOT_SERVED_YET", name, fields, says=("not served yet",))


def reference(text: str, reason: str = "INVALID_NAME") -> Case:
    return Case(InvalidArgument, reason, "adapter", {"adapter": text}, says=(repr(text.partition("@")[0])[1:-1],))


def missing(text: str, reason: str, *says: str) -> Case:
    return Case(NotFound, reason, "adapter", {"adapter": text}, says=says)


def token(path: str, fields: dict[str, Any], prompt: Any = "hello") -> Case:
    return Case(InvalidArgument, "TOKEN_OUT_OF_RANGE", path, fields, prompt, ("512",))


def output(**fields: Any) -> dict[str, Any]:
    return {"output": inference_pb2.OutputParams(**fields)}


CASES: dict[str, Case] = {
    "unknown adapter": missing("nobody", "ADAPTER_NOT_FOUND", "default/nobody"),
    "unknown tenant": missing("acme/known", "ADAPTER_NOT_FOUND", "acme/known"),
    "unknown version": missing("known@7", "VERSION_NOT_FOUND", "default/known", "7"),
    "unknown alias": missing("known:canary", "ALIAS_NOT_FOUND", "canary", "stable"),
    "version zero": reference("known@0", "INVALID_REFERENCE"),
    "version of words": reference("known@two", "INVALID_REFERENCE"),
    "version beyond numbers": reference("known@1" + "0" * 30, "INVALID_REFERENCE"),
    "no version": reference("known@", "INVALID_REFERENCE"),
    "version and alias": reference("known@1:stable", "INVALID_REFERENCE"),
    "no alias": Case(InvalidArgument, "INVALID_NAME", "adapter", {"adapter": "known:"}, says=("alias",)),
    "capitals": reference("Known"),
    "spaces": reference("kno wn"),
    "a path": Case(InvalidArgument, "INVALID_NAME", "adapter", {"adapter": "../known"}, says=("'..'",)),
    "two slashes": Case(InvalidArgument, "INVALID_NAME", "adapter", {"adapter": "a/b/c"}, says=("b/c",)),
    "a name too long": Case(InvalidArgument, "INVALID_NAME", "adapter", {"adapter": LONG}, says=("63",)),
    "a line break": Case(InvalidArgument, "INVALID_NAME", "adapter", {"adapter": "known\n"}),
    "another base's adapter": Case(
        FailedPrecondition, "BASE_MODEL_MISMATCH", "adapter", {"adapter": "other-base"}, says=("other", TINY_BASE)
    ),
    "prompt too long": Case(
        InvalidArgument, "PROMPT_TOO_LONG", "prompt", {}, [5] * MAX_MODEL_LEN, ("64 tokens", "at most 64")
    ),
    "prompt far too long": Case(InvalidArgument, "PROMPT_TOO_LONG", "prompt", {}, "word " * 5000),
    "empty text": Case(InvalidArgument, "EMPTY_PROMPT", "prompt", {}, ""),
    "no tokens": Case(InvalidArgument, "EMPTY_PROMPT", "prompt", {}, []),
    "prompt token": token("prompt", {}, [5, 512]),
    "prompt token at the end of integers": token("prompt", {}, [2**32 - 1]),
    "bias token": token("sampling.logit_bias", {"sampling": {"logit_bias": {512: 1.0}}}),
    "stop token": token("stopping.stop_token_ids", {"stopping": {"stop_token_ids": [512]}}),
    "n of zero": Case(InvalidArgument, "INVALID_PARAMETER", "sampling.n", {"sampling": {"n": 0}}),
    **{
        f"{name} {value}": sampling(name, value)
        for name, values in {
            "temperature": [-0.1, 100.5, NAN, INF, -INF],
            "top_p": [0.0, -0.5, 1.01, NAN],
            "min_p": [-0.1, 1.1, NAN],
            "repetition_penalty": [0.0, -1.0, 10.5, NAN, INF],
            "frequency_penalty": [-2.1, 2.1, NAN],
            "presence_penalty": [-2.1, 2.1, NAN],
        }.items()
        for value in values
    },
    **{
        f"bias {value}": Case(
            InvalidArgument,
            "INVALID_PARAMETER",
            "sampling.logit_bias[5]",
            {"sampling": {"logit_bias": {5: value}}},
        )
        for value in (100.5, -101.0, NAN, INF)
    },
    "no tokens asked for": Case(
        InvalidArgument, "INVALID_PARAMETER", "stopping.max_tokens", {"stopping": {"max_tokens": 0}}
    ),
    "more tokens at least than at most": Case(
        InvalidArgument, "INVALID_PARAMETER", "stopping.min_tokens", {"stopping": {"max_tokens": 4, "min_tokens": 5}}
    ),
    "more tokens at least than there is room for": Case(
        InvalidArgument, "INVALID_PARAMETER", "stopping.min_tokens", {"stopping": {"min_tokens": MAX_MODEL_LEN}}
    ),
    "an empty stop text": Case(InvalidArgument, "INVALID_STOP", "stopping.stop", {"stopping": {"stop": ["a", ""]}}),
    "seventeen stop texts": Case(
        InvalidArgument, "INVALID_STOP", "stopping.stop", {"stopping": {"stop": ["a"] * 17}}, says=("16",)
    ),
    "too many logprobs": Case(
        InvalidArgument, "INVALID_PARAMETER", "output.logprobs", output(logprobs=21), says=("20",)
    ),
    "an interval of zero": Case(
        InvalidArgument, "INVALID_STREAM_INTERVAL", "output.stream_interval", output(stream_interval=0)
    ),
    "a request_id too long": Case(
        InvalidArgument, "INVALID_REQUEST_ID", "request_id", {"request_id": "x" * 129}, says=("128",)
    ),
    "two answers": not_yet("sampling.n above 1", sampling={"n": 2}),
    "prompt_logprobs": not_yet("output.prompt_logprobs", **output(prompt_logprobs=1)),
    "a priority out of range": Case(InvalidArgument, "INVALID_PARAMETER", "priority", {"priority": 101}, says=("100",)),
}


class PausingSampler(Sampler):
    """Stops the engine at its next token while it is told not to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()
        self.goes_on.set()

    def sample(
        self, logits: Tensor, requests: Sequence[Request], greedy: GreedyRows | None = None
    ) -> list[SampledToken]:
        assert self.goes_on.wait(timeout=60)
        return super().sample(logits, requests, greedy)


@dataclass
class Service:
    """answer: what the service says while nothing is wrong"""

    server: InferenceServer
    sampler: PausingSampler
    answer: list[int]


@pytest.fixture(scope="module")
def service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("bad-input")
    with run_store(root / "store") as store:
        config = inference_config(
            tiny_model,
            root / "replica",
            http_port=None,
            adapter_store=store.address,
            max_model_len=MAX_MODEL_LEN,
            max_lora_rank=8,
            threads=1,
        )
        sampler = PausingSampler()
        with run_inference(config, sampler=sampler) as server:
            fill(store, root, tiny_model)
            yield Service(server, sampler, generate(server.address, good()).token_ids)


def fill(store: StoreProcess, root: Path, tiny_model: Path) -> None:
    """After the replica's start, which would refuse to hold less than the profile's rank."""
    other = make_tiny_llama(root / "other", hidden_size=64, layers=1)
    for name, model in ((TINY_BASE, tiny_model), ("other", other)):
        store.register_base(name, (model / "config.json").read_text())
    shapes: dict[str, tuple[Path, str, dict[str, Any]]] = {
        "known": (tiny_model, TINY_BASE, {}),
        "high-rank": (tiny_model, TINY_BASE, {"r": 16}),
        "overflowing": (tiny_model, TINY_BASE, {"std": 1e30}),
        "other-base": (other, "other", {}),
    }
    for name, (model, base, shape) in shapes.items():
        store.register(name, make_random_adapter(root / name, model, base_model_name_or_path=base, **shape), base)


def good(**fields: Any) -> inference_pb2.GenerateRequest:
    return request("hello", adapter="known", max_tokens=4, **fields)


def answers_as_before(service: Service) -> None:
    assert generate(service.server.address, good()).token_ids == service.answer
    stats = service.server.stats()
    assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input(service: Service, case: Case) -> None:
    before = service.server.stats().steps
    error = failure(service.server.address, request(case.prompt, **case.fields))
    assert type(error) is case.kind, error
    assert (error.reason, error.field) == (case.reason, case.field)
    for said in (case.field, *case.says) if not isinstance(error, NotFound | FailedPrecondition) else case.says:
        assert said in error.message, error.message
    assert service.server.stats().steps == before, "a step was spent on it"
    answers_as_before(service)


def test_no_prompt_at_all(service: Service) -> None:
    for message in (inference_pb2.GenerateRequest(), inference_pb2.GenerateRequest(messages={})):
        error = failure(service.server.address, message)
        assert (type(error), error.reason, error.field) == (InvalidArgument, "EMPTY_PROMPT", "prompt")
    answers_as_before(service)


@pytest.mark.parametrize("value", ["", "other-base", "default/known", "known@1"])
def test_metadata_that_disagrees(service: Service, value: str) -> None:
    with grpc.insecure_channel(service.server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(InvalidArgument) as caught:
            collect(stub.Generate(good(), metadata=[("x-multilora-adapter", value)]))
        assert (caught.value.reason, caught.value.field) == ("ADAPTER_METADATA_MISMATCH", "adapter")
        assert repr(value) in caught.value.message and "'known'" in caught.value.message
        assert collect(stub.Generate(good(), metadata=[("x-multilora-adapter", "known")]))
    answers_as_before(service)


def test_a_request_id_in_flight(service: Service) -> None:
    with Stream.running(service.server.address, [request("hello", max_tokens=50, request_id="mine")]) as [stream]:
        service.sampler.goes_on.clear()
        try:
            error = failure(service.server.address, good(request_id="mine"))
        finally:
            service.sampler.goes_on.set()
        assert (type(error), error.reason, error.field) == (AlreadyExists, "REQUEST_ID_IN_USE", "request_id")
        assert "'mine'" in error.message
        assert len(stream.rest()) == 50, "the first is not disturbed"
    assert generate(service.server.address, good(request_id="mine")).token_ids == service.answer
    answers_as_before(service)


def test_an_adapter_of_a_rank_beyond_this_replica(service: Service) -> None:
    """The store's profile takes it; this replica was started smaller."""
    for _ in range(2):
        error = failure(service.server.address, request("hello", adapter="high-rank"))
        assert (type(error), error.reason) == (FailedPrecondition, "ADAPTER_RANK_TOO_HIGH")
        assert (error.metadata["rank"], error.metadata["max_lora_rank"]) == ("16", "8")
        assert "--max-lora-rank" in error.message
        answers_as_before(service)


def test_an_adapter_that_overflows(service: Service) -> None:
    error = failure(service.server.address, request("hello", adapter="overflowing"))
    assert (type(error), error.reason, error.field) == (FailedPrecondition, "NON_FINITE_LOGITS", "adapter")
    answers_as_before(service)


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}},
        {"sampling": {"temperature": 1e-38, "seed": 0}},
        {"sampling": {"temperature": 1e-45, "seed": 2**64 - 1, "top_k": 2**32 - 1}},
        {"sampling": {"temperature": 100.0, "top_p": 1e-30, "min_p": 1.0}},
        {"sampling": {"temperature": 1.0, "repetition_penalty": 1e-44}},
        {"sampling": {"temperature": 1.0, "repetition_penalty": 10.0, "frequency_penalty": -2.0}},
        {"sampling": {"logit_bias": dict.fromkeys(range(512), -100.0)}},
        {"sampling": {"temperature": 1.0}, "stopping": {"stop_token_ids": list(range(512)), "min_tokens": 3}},
        {"stopping": {"max_tokens": 2**32 - 1}},
        {"stopping": {"stop": ["\0", "🙂" * 1000, *"abcdefghijklmn"]}},
        {"request_id": "x" * 128, "cache_salt": "s" * 10_000, "routing_key": "k" * 10_000},
        {"request_id": "ünïcödé \n 日本"},
        output(stream_interval=2**32 - 1, logprobs=20),
    ],
    ids=lambda fields: json.dumps(fields, default=str)[:60],
)
def test_what_is_odd_but_right_is_answered(service: Service, fields: dict[str, Any]) -> None:
    answer = generate(service.server.address, request("hello", **fields))
    assert answer.token_ids
    assert answer.finished.usage.completion_tokens == len(answer.token_ids)
    answers_as_before(service)


@pytest.mark.parametrize("timeout", [1e6, 5e9])
def test_a_deadline_in_another_century(service: Service, timeout: float) -> None:
    assert len(generate(service.server.address, good(), timeout=timeout).token_ids) == 4
    answers_as_before(service)
