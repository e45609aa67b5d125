"""The gRPC face: what each call answers, refuses and lets go of. The client here knows the protos."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from multilora.common.v1 import common_pb2
from multilora.inference.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.common.errors import DeadlineExceeded, InvalidArgument, MultiloraError, NotFound, Unimplemented
from services.common.rpc import from_rpc_error
from tests.clients import collect, failure, generate, request
from tests.conftest import TINY_BASE
from tests.inference.http.pair import ADAPTER, ANSWER_TOKENS, Pair, ended_early, run_pair


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with run_pair(tiny_model, tmp_path_factory.mktemp("servicer")) as running:
        yield running


@pytest.fixture
def channel(pair: Pair) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(pair.server.address) as open_channel:
        yield open_channel


@pytest.fixture
def stub(channel: grpc.Channel) -> inference_pb2_grpc.InferenceServiceStub:
    return inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
def control(channel: grpc.Channel) -> control_pb2_grpc.AdapterControlServiceStub:
    return control_pb2_grpc.AdapterControlServiceStub(channel)


def raised(call: Any, *arguments: Any, **options: Any) -> MultiloraError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options)
    return from_rpc_error(caught.value)


# ---- Generate


def test_events_come_in_order_and_add_up(pair: Pair) -> None:
    answer = generate(pair.server.address, request("The harbour", adapter="pirate", max_tokens=6, request_id="mine"))
    assert answer.started.request_id == "mine"
    assert (answer.started.adapter, answer.started.version) == (ADAPTER, 1)
    assert answer.started.digest == pair.digest
    assert answer.finished.reason == inference_pb2.FINISH_REASON_LENGTH
    assert answer.finished.usage.completion_tokens == len(answer.token_ids) == 6
    assert answer.finished.usage.prompt_tokens == answer.started.prompt_tokens
    timings = answer.finished.timings
    assert 0 <= timings.queue <= timings.ttft <= timings.total


@pytest.mark.parametrize("adapter", ["", TINY_BASE])
def test_the_base_model_is_bound_to_no_version(pair: Pair, adapter: str) -> None:
    started = generate(pair.server.address, request("x", adapter=adapter, max_tokens=1)).started
    assert (started.adapter, started.version, started.digest) == ("", 0, "")
    assert started.tier == common_pb2.TIER_UNSPECIFIED


def test_temperature_defaults_to_zero_without_sampling_and_to_one_with(pair: Pair) -> None:
    def ids(sampling: dict[str, Any] | None) -> list[int]:
        return generate(pair.server.address, request("x", max_tokens=24, sampling=sampling)).token_ids

    assert ids(None) == ids({"temperature": 0}) == ids({"temperature": 0, "seed": 1})
    assert ids({"seed": 1}) == ids({"seed": 1, "temperature": 1}) != ids(None)


def test_a_seed_left_out_is_random_and_zero_is_a_seed(pair: Pair) -> None:
    def ids(sampling: dict[str, Any]) -> list[int]:
        return generate(pair.server.address, request("x", max_tokens=24, sampling=sampling)).token_ids

    assert ids({"temperature": 1}) != ids({"temperature": 1})
    assert ids({"seed": 0}) == ids({"seed": 0})


def test_logprobs_and_chunks_of_several_tokens(pair: Pair, stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    output = inference_pb2.OutputParams(logprobs=2, stream_interval=4)
    events = collect(stub.Generate(request("x", max_tokens=8, output=output)))
    chunks = [event.chunk for event in events if event.HasField("chunk")]
    lengths = [len(chunk.token_ids) for chunk in chunks]
    assert sum(lengths) == 8
    assert all(length >= 4 for length in lengths[:-1])  # 8 where both gathered before the first was sent
    positions = [position for chunk in chunks for position in chunk.logprobs]
    assert [position.chosen.token_id for position in positions] == [
        token for chunk in chunks for token in chunk.token_ids
    ]
    assert all(position.chosen == position.top[0] and len(position.top) == 2 for position in positions)
    none = generate(pair.server.address, request("x", max_tokens=8))
    assert [token for chunk in chunks for token in chunk.token_ids] == none.token_ids


def test_prompts_as_text_ids_and_messages_agree(pair: Pair, stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    messages = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="hello")])
    ids = stub.Tokenize(inference_pb2.TokenizeRequest(messages=messages)).ids
    stopping = inference_pb2.StoppingParams(max_tokens=6, ignore_eos=True)
    chat = collect(stub.Generate(inference_pb2.GenerateRequest(messages=messages, stopping=stopping)))
    as_ids = generate(pair.server.address, request(list(ids), max_tokens=6))
    assert [token for event in chat for token in event.chunk.token_ids] == as_ids.token_ids


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"sampling": {"n": 2}}, "sampling.n above 1"),
        ({"output": inference_pb2.OutputParams(prompt_logprobs=0)}, "output.prompt_logprobs"),
    ],
)
def test_what_is_not_served_yet_is_refused_by_name(pair: Pair, fields: dict[str, Any], name: str) -> None:
    error = failure(pair.server.address, request("x", **fields))
    assert isinstance(error, Unimplemented)
    assert (error.reason, error.field) == ("NOT_SERVED_YET", name)


def test_defaults_said_aloud_and_a_cache_salt_are_taken(pair: Pair) -> None:
    message = request("x", max_tokens=1, sampling={"n": 1}, priority=-3, cache_salt="mine", routing_key="key")
    assert len(generate(pair.server.address, message).token_ids) == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sampling": {"n": 0}}, "sampling.n"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"repetition_penalty": 0}}, "sampling.repetition_penalty"),
        ({"sampling": {"logit_bias": {512: 1}}}, "sampling.logit_bias"),
        ({"stopping": {"max_tokens": 0}}, "stopping.max_tokens"),
        ({"stopping": {"stop": [""]}}, "stopping.stop"),
        ({"output": inference_pb2.OutputParams(logprobs=21)}, "output.logprobs"),
        ({"output": inference_pb2.OutputParams(stream_interval=0)}, "output.stream_interval"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"adapter": "No Such Name"}, "adapter"),
    ],
)
def test_zero_is_not_unset_and_ranges_are_kept(pair: Pair, fields: dict[str, Any], field: str) -> None:
    error = failure(pair.server.address, request("x", **fields))
    assert isinstance(error, InvalidArgument)
    assert error.field == field


@pytest.mark.parametrize(
    "message",
    [
        inference_pb2.GenerateRequest(),
        inference_pb2.GenerateRequest(text=""),
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds()),
        inference_pb2.GenerateRequest(messages=inference_pb2.ChatMessages()),
    ],
)
def test_an_empty_prompt(pair: Pair, message: inference_pb2.GenerateRequest) -> None:
    error = failure(pair.server.address, message)
    assert isinstance(error, InvalidArgument)
    assert (error.reason, error.field) == ("EMPTY_PROMPT", "prompt")


def test_a_missing_adapter(pair: Pair) -> None:
    error = failure(pair.server.address, request("x", adapter="nobody"))
    assert isinstance(error, NotFound)
    assert (error.reason, error.field) == ("ADAPTER_NOT_FOUND", "adapter")


def test_the_metadata_must_equal_the_field(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    message = request("x", adapter="pirate", max_tokens=1)
    assert collect(stub.Generate(message, metadata=[("x-multilora-adapter", "pirate")]))
    for value in ("", "default/pirate", "other"):
        with pytest.raises(InvalidArgument) as caught:
            collect(stub.Generate(message, metadata=[("x-multilora-adapter", value)]))
        assert caught.value.reason == "ADAPTER_METADATA_MISMATCH"


def test_a_cancelled_call_holds_nothing(pair: Pair, stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    with ended_early(pair.server):
        call = stub.Generate(request("x", max_tokens=ANSWER_TOKENS))
        assert next(call).HasField("started")
        call.cancel()


def test_a_call_past_its_deadline_holds_nothing(pair: Pair) -> None:
    with ended_early(pair.server), pytest.raises(DeadlineExceeded):
        generate(pair.server.address, request("x", max_tokens=ANSWER_TOKENS), timeout=0.2)


# ---- the other calls


def test_tokenize_and_detokenize_are_inverse(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    text = "Zwölf Boxkämpfer — 10 €"
    ids = stub.Tokenize(inference_pb2.TokenizeRequest(text=text)).ids
    assert stub.Detokenize(inference_pb2.DetokenizeRequest(ids=ids)).text == text
    assert stub.Detokenize(inference_pb2.DetokenizeRequest()).text == ""
    assert raised(stub.Tokenize, inference_pb2.TokenizeRequest()).reason == "EMPTY_PROMPT"
    assert raised(stub.Detokenize, inference_pb2.DetokenizeRequest(ids=[512])).field == "ids"


def test_special_tokens_are_left_out_on_request(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    ids = [1, 40, 2]
    bare = stub.Detokenize(inference_pb2.DetokenizeRequest(ids=ids, skip_special_tokens=True)).text
    whole = stub.Detokenize(inference_pb2.DetokenizeRequest(ids=ids)).text
    assert whole == f"<|im_start|>{bare}<|im_end|>"


def test_model_info(stub: inference_pb2_grpc.InferenceServiceStub, tiny_model: Path) -> None:
    info = stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert (info.model, info.architecture, info.dtype) == (TINY_BASE, "LlamaForCausalLM", "float32")
    assert (info.vocab_size, info.max_model_len, info.max_loras, info.max_lora_rank) == (512, 2048, 8, 64)
    assert json.loads(info.config_json) == json.loads((tiny_model / "config.json").read_text())


def test_the_control_service_tells_the_engines_truth(
    pair: Pair, control: control_pb2_grpc.AdapterControlServiceStub
) -> None:
    generate(pair.server.address, request("x", adapter="pirate", max_tokens=1))
    before = control.GetServerInfo(control_pb2.GetServerInfoRequest())
    generate(pair.server.address, request("x", adapter="pirate", max_tokens=5))
    after = control.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert after.steps - before.steps == 5
    assert after.uptime > before.uptime > 0
    assert after.model == TINY_BASE
    assert (after.requests_running, after.requests_waiting, after.kv_blocks_free) == (0, 0, after.kv_blocks)
    (adapter,) = control.ListAdapters(control_pb2.ListAdaptersRequest()).adapters
    assert (adapter.identity.adapter, adapter.identity.digest) == (ADAPTER, pair.digest)
    assert adapter.identity.base_model == TINY_BASE
    assert (adapter.tier, adapter.references, adapter.rank) == (common_pb2.TIER_GPU, 0, 8)
    assert adapter.requests >= 2


def test_health_can_be_asked_and_watched(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "multilora.inference.v1.InferenceService", "multilora.inference.v1.AdapterControlService"):
        asked = health_pb2.HealthCheckRequest(service=service)
        assert health.Check(asked).status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
