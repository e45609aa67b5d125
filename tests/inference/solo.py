"""What a request is answered when it has the server to itself, to compare with what it is answered otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from services.inference.model.compiled_runner import CompiledRunner
from tests.clients import Answer, collect
from tests.conftest import InferenceServer
from tests.parity.oracle import Continuation, assert_same_tokens

__all__ = ["Alone", "Stream", "assert_said_alone", "solo", "token_ids"]


@dataclass(frozen=True)
class Alone(Continuation):
    """An answer that was given alone.

    logprobs: of its tokens
    exact: it is the same bits in any company, as the compiled path promises
    """

    logprobs: list[float]
    exact: bool


def solo(server: InferenceServer, message: inference_pb2.GenerateRequest) -> Alone:
    """A greedy answer, and by how much the best token led at each, from the two best log-probabilities."""
    asked = inference_pb2.GenerateRequest()
    asked.CopyFrom(message)
    asked.request_id = ""
    asked.output.logprobs = 2
    with grpc.insecure_channel(server.address) as channel:
        events = collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(asked, timeout=120))
    positions = [position for event in events for position in event.chunk.logprobs]
    return Alone(
        token_ids(events),
        [position.top[0].logprob - position.top[1].logprob for position in positions],
        [position.chosen.logprob for position in positions],
        isinstance(server.runner, CompiledRunner),
    )


def assert_said_alone(answer: Answer | list[int], expected: Alone, what: str) -> None:
    """The answer, or its tokens, is what was said alone: exactly, or on the torch path up to a near tie."""
    found = answer.token_ids if isinstance(answer, Answer) else answer
    if not expected.exact:
        assert_same_tokens(found, expected, what)
        return
    assert found == expected.token_ids, f"{what}: other tokens than alone"
    if isinstance(answer, Answer) and answer.logprobs:
        assert answer.logprobs == expected.logprobs, f"{what}: other bits than alone"


def token_ids(events: Sequence[inference_pb2.GenerateResponse]) -> list[int]:
    return [token for event in events for token in event.chunk.token_ids]


@dataclass
class Stream:
    """A call whose first tokens have come: its request is running now."""

    call: Any
    events: list[inference_pb2.GenerateResponse]

    @classmethod
    @contextlib.contextmanager
    def running(cls, address: str, messages: Sequence[inference_pb2.GenerateRequest]) -> Iterator[list[Stream]]:
        """Send all, and wait until each has brought a token."""
        with grpc.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            streams = [cls(stub.Generate(message, timeout=120), []) for message in messages]
            for stream in streams:
                while not token_ids(stream.events):
                    stream.events.append(next(stream.call))
            yield streams
            for stream in streams:
                stream.call.cancel()

    def rest(self) -> list[int]:
        """Wait for the end; the whole answer."""
        self.events += collect(self.call)
        return token_ids(self.events)
