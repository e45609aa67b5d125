"""The frames of a streamed answer, byte by byte."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import TINY_BASE, inference_config, run_inference
from tests.inference.http.pair import ANSWER_TOKENS, eventually

BODIES = {
    "/v1/completions": {"model": TINY_BASE, "prompt": "x", "temperature": 0, "max_tokens": 4, "stream": True},
    "/v1/chat/completions": {
        "model": TINY_BASE,
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 0,
        "max_tokens": 4,
        "stream": True,
    },
}


def frames(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.text.endswith("\n\n")
    found = answer.text[:-2].split("\n\n")
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in found)
    return [frame.removeprefix("data: ") for frame in found]


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_is_data_frames_and_done(http: httpx.Client, path: str) -> None:
    *pieces, done = frames(http.post(path, json=BODIES[path]))
    assert done == "[DONE]"
    bodies: list[dict[str, Any]] = list(map(json.loads, pieces))
    assert all(len(body["choices"]) == 1 and "usage" not in body for body in bodies)
    assert [("multilora" in body) for body in bodies] == [True] + [False] * (len(bodies) - 1)
    assert [body["choices"][0]["finish_reason"] for body in bodies] == [None] * (len(bodies) - 1) + ["length"]


@pytest.mark.parametrize("path", BODIES)
def test_usage_comes_last_when_it_is_asked_for(http: httpx.Client, path: str) -> None:
    body = BODIES[path] | {"stream_options": {"include_usage": True}}
    bodies = [json.loads(frame) for frame in frames(http.post(path, json=body))[:-1]]
    assert all(body["usage"] is None for body in bodies[:-1])
    assert bodies[-1]["choices"] == []
    assert bodies[-1]["usage"]["completion_tokens"] == 4
    assert bodies[-1]["id"] == bodies[0]["id"]


@pytest.mark.parametrize("path", BODIES)
def test_an_error_before_the_first_token_has_its_own_status(http: httpx.Client, path: str) -> None:
    answer = http.post(path, json=BODIES[path] | {"model": "nobody"})
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["code"] == "ADAPTER_NOT_FOUND"


def test_an_answer_the_server_cancels_is_an_error_not_a_short_answer(tiny_model: Path, tmp_path: Path) -> None:
    """As when a replica shuts down and the grace is over."""
    body = BODIES["/v1/completions"] | {"max_tokens": ANSWER_TOKENS, "ignore_eos": True}
    with (
        run_inference(inference_config(tiny_model, tmp_path, threads=1)) as server,
        httpx.Client(base_url=server.http, timeout=60) as http,
        ThreadPoolExecutor() as pool,
    ):
        whole = pool.submit(httpx.post, f"{server.http}/v1/completions", json=body | {"stream": False}, timeout=60)
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert "choices" in next(lines)
            eventually(lambda: server.stats().running == 2)
            server.call(server.serving.engine.shutdown(drain=False, timeout=20))
            *_, error, done = [line.removeprefix("data: ") for line in lines if line]
        assert done == "[DONE]"
        assert json.loads(error)["error"]["code"] == "CANCELLED"
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "CANCELLED"
