"""A client that knows no protos: everything it sends and reads it learned from the server's reflection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from services.common.rpc import from_rpc_error
from tests.conftest import inference_config, run_inference

SERVICE = "multilora.inference.v1.InferenceService"


@pytest.fixture(scope="module")
def channel(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    config = inference_config(tiny_model, tmp_path_factory.mktemp("reflection"), threads=1)
    with run_inference(config) as server, grpc.insecure_channel(server.address) as open_channel:
        yield open_channel


@pytest.fixture(scope="module")
def reflected(channel: grpc.Channel) -> ProtoReflectionDescriptorDatabase:
    return ProtoReflectionDescriptorDatabase(channel)


def generate(channel: grpc.Channel, reflected: ProtoReflectionDescriptorDatabase, **fields: Any) -> list[Any]:
    method = DescriptorPool(reflected).FindServiceByName(SERVICE).FindMethodByName("Generate")
    ask, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    call = channel.unary_stream(f"/{SERVICE}/Generate", ask.SerializeToString, answer.FromString)
    return list(call(ask(**fields), timeout=60))


def test_the_services_are_listed(reflected: ProtoReflectionDescriptorDatabase) -> None:
    assert set(reflected.get_services()) == {
        SERVICE,
        "multilora.inference.v1.AdapterControlService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_it_generates(channel: grpc.Channel, reflected: ProtoReflectionDescriptorDatabase) -> None:
    events = generate(channel, reflected, text="The harbour", stopping={"max_tokens": 3, "ignore_eos": True})
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert events[-1].finished.usage.completion_tokens == 3


def test_it_reads_the_typed_error_of_a_missing_adapter(
    channel: grpc.Channel, reflected: ProtoReflectionDescriptorDatabase
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        generate(channel, reflected, text="x", adapter="nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    error = from_rpc_error(caught.value)
    assert (error.reason, error.field) == ("ADAPTER_NOT_FOUND", "adapter")
