"""What `services.bench.streaming` measures, one server a process: `python -m services.bench.streaming_servers KIND …`.

face    the serving face of the inference service over a stub engine in a process of its own
bare    a grpc.aio handler that yields the same messages, made beforehand: no request is looked at, no text decoded
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from multilora.inference.v1 import inference_pb2
from services.bench.stub_engine import stub_engine
from services.common.rpc import wait_for_signal
from services.inference.config import AdapterConfig, ServerConfig
from services.inference.model.config import load_config
from services.inference.server import serve
from services.inference.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and then over whatever else stands about in the yard.\n"


async def face(arguments: argparse.Namespace) -> None:
    config = ServerConfig(
        model=arguments.model,
        port=0,
        http_port=None,
        engine_process=arguments.engine_process,
        max_unread_tokens=1 << 20,
        adapters=AdapterConfig(),
    )
    tokenizer = Tokenizer.load(arguments.model, frozenset())
    build = functools.partial(stub_engine, tokenizer.encode(TEXT), arguments.step_seconds)
    async with serve(config, build) as running:
        print(f"listening on 127.0.0.1:{running.port}", flush=True)
        await wait_for_signal()


async def bare(arguments: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(arguments.model, load_config(arguments.model).eos_token_ids)
    messages = [
        inference_pb2.GenerateResponse(
            chunk=inference_pb2.Chunk(text=tokenizer.token_text(token_id), token_ids=[token_id])
        )
        for token_id in tokenizer.encode(TEXT)
    ]

    async def generate(
        request: inference_pb2.GenerateRequest, _context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        for message in itertools.islice(itertools.cycle(messages), request.stopping.max_tokens):
            yield message

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(
        generate,
        inference_pb2.GenerateRequest.FromString,
        inference_pb2.GenerateResponse.SerializeToString,
    )
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Generate": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await wait_for_signal()
    await server.stop(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("face", "bare"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--engine-process", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    asyncio.run({"face": face, "bare": bare}[arguments.kind](arguments))


if __name__ == "__main__":
    main()
