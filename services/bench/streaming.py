"""Tokens a second through the serving face, beside a bare grpc.aio server: `python -m services.bench.streaming`.

Both servers send the same tokens over the same number of streams of one connection, to the same client, in turns. The
face runs over a stub engine, so that what is measured is the way from the engine's message to the client's.
JSON lines, one a server, go to --out, the table to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from services.bench import servers
from services.bench.progress import console
from services.bench.results import Figure, Result, print_table, write_lines

TARGET_TOKENS = 30_000.0
TARGET_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Streamed:
    """What the streams of one round brought, in `seconds`."""

    tokens: int
    chunks: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@contextlib.contextmanager
def server(kind: str, *flags: str) -> Iterator[str]:
    """Address of a server of `services.bench.streaming_servers`."""
    command = [sys.executable, "-m", "services.bench.streaming_servers", kind, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                raise RuntimeError(f"the {kind} server did not start")
            yield line.split()[-1]
        finally:
            process.terminate()
            process.wait()


async def stream(address: str, streams: int, tokens: int) -> Streamed:
    """Ask for `tokens` on each of `streams`, all at once, and read them to the end."""
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]),
        stopping=inference_pb2.StoppingParams(max_tokens=tokens, ignore_eos=True),
    )

    async def read(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> tuple[int, int]:
        got = chunks = 0
        async for response in stub.Generate(request):
            if count := len(response.chunk.token_ids):
                got += count
                chunks += 1
        return got, chunks

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await channel.channel_ready()
        began = time.perf_counter()
        counts = await asyncio.gather(*(read(stub) for _ in range(streams)))
        seconds = time.perf_counter() - began
    found = Streamed(sum(got for got, _ in counts), sum(chunks for _, chunks in counts), seconds)
    assert found.tokens == streams * tokens, "tokens were lost"
    return found


def compare(model: Path, streams: int, tokens: int, rounds: int, step_seconds: float) -> list[Result]:
    """Face, bare, face, bare …; a first round, which warms both, is not counted."""
    found: dict[str, list[Streamed]] = {"face": [], "bare": []}
    flags = ("--model", str(model))
    with server("face", *flags, "--step-seconds", str(step_seconds)) as face, server("bare", *flags) as bare:
        for number in range(rounds + 1):
            for name, address in (("face", face), ("bare", bare)):
                streamed = asyncio.run(stream(address, streams, tokens))
                if number:
                    found[name].append(streamed)
    setup = {"streams": streams, "tokens": tokens, "rounds": rounds, "step_seconds": step_seconds, "model": model.name}
    rates = {name: statistics.median(each.tokens_per_second for each in rows) for name, rows in found.items()}
    share = rates["face"] / rates["bare"]
    figures = {
        "face": [
            Figure("tokens a second through the serving face", rates["face"], target=TARGET_TOKENS),
            Figure("its share of a bare grpc.aio stream", share, target=TARGET_SHARE),
        ],
        "bare": [Figure("tokens a second through bare grpc.aio", rates["bare"])],
    }
    return [
        Result(
            "streaming",
            {"server": name, **setup},
            {
                "tokens_per_second": [round(each.tokens_per_second) for each in rows],
                "chunks_per_second": [round(each.chunks / each.seconds) for each in rows],
                "tokens_per_chunk": round(sum(each.tokens for each in rows) / sum(each.chunks for each in rows), 2),
            },
            figures[name],
        )
        for name, rows in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="where the tokenizer comes from; the small model of the demo if left out"
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=500, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=None, help="append the JSON lines to this; default: standard output"
    )
    parser.add_argument("--step-seconds", type=float, default=0.0, help="0: as fast as the face takes them")
    asked = parser.parse_args(arguments)
    model = asked.model or servers.embedded_model()
    results = compare(model, asked.streams, asked.tokens, asked.rounds, asked.step_seconds)
    write_lines(results, asked.out)
    print_table(results, console, "Streaming")


if __name__ == "__main__":
    main()
