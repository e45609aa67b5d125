"""`multilora generate`, `chat` and `status` against a real replica."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import grpc

from multilora.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.cli.conftest import Cli
from tests.clients import collect, generate, request
from tests.conftest import ROOT, TINY_BASE
from tests.inference.http.pair import ADAPTER, Pair


def chat_answer(pair: Pair, *turns: tuple[str, str], max_tokens: int) -> str:
    message = inference_pb2.GenerateRequest(stopping=inference_pb2.StoppingParams(max_tokens=max_tokens))
    for role, content in turns:
        message.messages.messages.add(role=role, content=content)
    with grpc.insecure_channel(pair.server.address) as channel:
        events = collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(message))
    return "".join(event.chunk.text for event in events)


def test_generate_prints_the_text_and_a_newline(cli: Cli, pair: Pair) -> None:
    done = cli("generate", "The harbour", "--max-tokens", "8", "--adapter", "pirate")
    assert done.returncode == 0, done.stderr
    message = request("The harbour", adapter=ADAPTER, max_tokens=8, ignore_eos=False)
    assert done.stdout == generate(pair.server.address, message).text + "\n"


def test_generate_reads_stdin_and_takes_options(cli: Cli, pair: Pair) -> None:
    options = ("--temperature", "0.9", "--top-p", "0.9", "--top-k", "40", "--seed", "5", "--max-tokens", "8")
    done = cli("generate", "-", *options, "--stop", "@@", stdin="The harbour")
    sampling = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 5}
    message = request("The harbour", max_tokens=8, ignore_eos=False, sampling=sampling)
    assert done.stdout == generate(pair.server.address, message).text + "\n"


def test_generate_as_chat(cli: Cli, pair: Pair) -> None:
    done = cli("generate", "hello", "--chat", "--max-tokens", "8")
    assert done.stdout == chat_answer(pair, ("user", "hello"), max_tokens=8) + "\n"


def test_chat_keeps_the_conversation_until_reset(cli: Cli, pair: Pair) -> None:
    done = cli("chat", "--system", "Be brief.", "--max-tokens", "6", stdin="one\ntwo\n\n/reset\none\n/quit\nthree\n")
    assert done.returncode == 0, done.stderr
    system = ("system", "Be brief.")
    first = chat_answer(pair, system, ("user", "one"), max_tokens=6)
    turns = (system, ("user", "one"), ("assistant", first), ("user", "two"))
    second = chat_answer(pair, *turns, max_tokens=6)
    assert done.stdout == f"{first}\n{second}\n{first}\n"


def test_chat_goes_on_after_an_error(cli: Cli, pair: Pair) -> None:
    done = cli("chat", "--adapter", "nobody", "--max-tokens", "6", stdin="one\n/adapter\none\n")
    assert done.returncode == 0
    assert "[ADAPTER_NOT_FOUND]" in done.stderr
    assert done.stdout == chat_answer(pair, ("user", "one"), max_tokens=6) + "\n"


def test_status_shows_what_is_resident(cli: Cli, pair: Pair) -> None:
    generate(pair.server.address, request("x", adapter="pirate", max_tokens=1))
    found = json.loads(cli("status", "--json").stdout)
    assert found["server"]["model"] == TINY_BASE
    assert found["server"]["requests_running"] == 0
    (adapter,) = found["adapters"]
    assert (adapter["adapter"], adapter["tier"], adapter["digest"]) == (f"{ADAPTER}@1", "GPU", pair.digest)
    text = cli("status").stdout
    assert f"{ADAPTER}@1" in text
    assert "0 running, 0 waiting" in text


def test_a_watched_status_is_a_line_a_look_until_interrupted(pair: Pair) -> None:
    command = [sys.executable, "-m", "services.cli.main", "--server-admin", pair.server.address]
    command += ["status", "--watch", "--interval", "0.1", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        looks = [json.loads(process.stdout.readline())["server"] for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    assert [look["model"] for look in looks] == [TINY_BASE] * 3
    assert looks[0]["uptime"] < looks[1]["uptime"] < looks[2]["uptime"]


def test_an_adapter_is_loaded_pinned_and_unloaded(cli: Cli) -> None:
    def said(*arguments: str) -> str:
        done = cli("adapters", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert said("load", "pirate") == f"{ADAPTER}@1 is loaded (GPU)"
    assert said("pin", "pirate@1") == f"{ADAPTER}@1 is pinned"
    (adapter,) = json.loads(cli("status", "--json").stdout)["adapters"]
    assert (adapter["state"], adapter["pinned"]) == ("GPU", True)
    assert said("unpin", "pirate") == "pirate is unpinned"
    assert said("unload", "pirate", "--drain-timeout", "5") == "pirate is unloaded; 0 requests were cancelled"
    again = cli("adapters", "unload", "pirate")
    assert (again.returncode, "[ADAPTER_NOT_FOUND]" in again.stderr) == (
        cli("adapters", "load", "nobody").returncode,
        True,
    )
    assert "--adapter-root" in cli("adapters", "load", "pirate", "--path", "x").stderr
    said("load", "pirate")
