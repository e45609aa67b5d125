"""A plain gRPC client of the inference service, as a backend service would write it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from services.common.errors import MultiloraError
from services.common.rpc import from_rpc_error


@dataclass(frozen=True)
class Answer:
    """One request's events, put together. logprobs: of the tokens chosen, where the request asked for them"""

    started: inference_pb2.Started
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finished: inference_pb2.Finished


def request(
    prompt: str | Sequence[int],
    *,
    adapter: str = "",
    max_tokens: int = 16,
    ignore_eos: bool = True,
    sampling: dict[str, Any] | None = None,
    stopping: dict[str, Any] | None = None,
    **fields: Any,
) -> inference_pb2.GenerateRequest:
    message = inference_pb2.GenerateRequest(
        adapter=adapter,
        sampling=None if sampling is None else inference_pb2.SamplingParams(**sampling),
        stopping=inference_pb2.StoppingParams(
            **({"max_tokens": max_tokens, "ignore_eos": ignore_eos} | (stopping or {}))
        ),
        **fields,
    )
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    return message


def generate(address: str, message: inference_pb2.GenerateRequest, *, timeout: float = 120) -> Answer:
    """Send one request and wait for its whole answer. Raises the server's error, as it was raised there."""
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        events = collect(stub.Generate(message, timeout=timeout))
    started = [event.started for event in events if event.HasField("started")]
    chunks = [event.chunk for event in events if event.HasField("chunk")]
    finished = [event.finished for event in events if event.HasField("finished")]
    assert events[0].HasField("started")
    assert events[-1].HasField("finished")
    assert len(started) == len(finished) == 1
    return Answer(
        started[0],
        [token for chunk in chunks for token in chunk.token_ids],
        [position.chosen.logprob for chunk in chunks for position in chunk.logprobs],
        "".join(chunk.text for chunk in chunks),
        finished[0],
    )


def collect(call: Any) -> list[inference_pb2.GenerateResponse]:
    try:
        return list(call)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def generate_all(address: str, messages: Sequence[inference_pb2.GenerateRequest]) -> list[Answer]:
    """Send all at once; the answers in the order of the requests. Raises the first error."""
    with ThreadPoolExecutor(len(messages)) as pool:
        return list(pool.map(lambda message: generate(address, message), messages))


def failure(address: str, message: inference_pb2.GenerateRequest) -> MultiloraError:
    """The error a request ends with; fails when it is answered."""
    try:
        answer = generate(address, message)
    except MultiloraError as error:
        return error
    raise AssertionError(f"the request was answered: {answer}")
