"""What a request is answered when it has the server to itself, to compare with what it is answered otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.clients import collect
from tests.parity.oracle import NEAR_TIE, Continuation, assert_same_tokens

__all__ = ["NEAR_TIE", "Stream", "assert_same_tokens", "solo", "token_ids"]


def solo(address: str, message: inference_pb2.GenerateRequest) -> Continuation:
    """A greedy answer, and by how much the best token led at each, from the two best log-probabilities."""
    asked = inference_pb2.GenerateRequest()
    asked.CopyFrom(message)
    asked.request_id = ""
    asked.output.logprobs = 2
    with grpc.insecure_channel(address) as channel:
        events = collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(asked, timeout=120))
    positions = [position for event in events for position in event.chunk.logprobs]
    return Continuation(
        token_ids(events), [position.top[0].logprob - position.top[1].logprob for position in positions]
    )


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
