"""What the HTTP face refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from services.common.errors import ERRORS_BY_CODE
from services.inference.http.body import MAX_BODY_BYTES
from services.inference.http.errors import HTTP_STATUS
from services.inference.http.fields import IGNORED
from tests.conftest import TINY_BASE

COMPLETION = {"model": TINY_BASE, "prompt": "x", "max_tokens": 1}
CHAT = {"model": TINY_BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
TOOL = {"type": "function", "function": {"name": "f"}}


def refused(http: httpx.Client, path: str, body: Any, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """The error of a call that must be answered with 400."""
    answer = http.post(path, json=body, headers=headers)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("best_of", 2),
        ("echo", True),
        ("suffix", "after"),
        ("tools", [TOOL]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("prompt_logprobs", 1),
        ("use_beam_search", True),
        ("guided_json", {}),
    ],
)
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_a_field_that_is_not_served_is_named(
    http: httpx.Client, path: str, body: dict[str, Any], name: str, value: object
) -> None:
    error = refused(http, path, body | {name: value})
    assert error["param"] == name
    assert name in error["message"]
    assert error["code"] in ("NOT_SERVED_YET", "UNKNOWN_FIELD")


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 1, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "echo": False},
        {"n": None, "seed": None, "stop": None, "logprobs": None, "logit_bias": None, "stream_options": None},
        dict.fromkeys(IGNORED, "anything"),
        {"stream_options": {"include_usage": True}},
        {"top_k": -1},
    ],
)
def test_what_asks_for_nothing_is_taken(http: httpx.Client, extra: dict[str, Any]) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        answer = http.post(path, json=body | extra)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"model": "No Such Name"}, "model"),
        ({"temperature": 101}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [512]}, "stop_token_ids"),
        ({"logit_bias": {"9": 101}}, "logit_bias[9]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [1] * 2048}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
    ],
)
def test_a_value_out_of_range_is_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    error = refused(http, "/v1/completions", COMPLETION | change)
    assert error["param"] == param
    assert "sampling." not in error["message"]
    assert "stopping." not in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [TOOL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
    ],
)
def test_chat_names_its_own_fields(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    assert refused(http, "/v1/chat/completions", CHAT | change)["param"] == param


@pytest.mark.parametrize("body", [b"", b"[1", b"[]", b'"x"', b"\xff", b'{"a":NaN}', b'{"a":"\\ud800"}', b"[" * 100_000])
def test_a_body_that_is_no_json_object(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "INVALID_JSON"


def test_a_body_beyond_the_limit(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "CONTENT_TOO_LARGE"


def test_paths_and_methods_that_do_not_exist(http: httpx.Client) -> None:
    assert http.post("/v1/embeddings", json={}).json()["error"]["code"] == "NOT_FOUND"
    wrong = http.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["code"] == "METHOD_NOT_ALLOWED"
    assert wrong.headers["allow"] == "POST"


def test_the_routing_header_must_equal_the_model(http: httpx.Client) -> None:
    error = refused(http, "/v1/completions", COMPLETION, {"x-multilora-adapter": "pirate"})
    assert (error["code"], error["param"]) == ("ADAPTER_METADATA_MISMATCH", "model")
    same = http.post("/v1/completions", json=COMPLETION, headers={"x-multilora-adapter": TINY_BASE})
    assert same.status_code == 200


def test_every_error_has_a_status() -> None:
    assert set(HTTP_STATUS) == set(ERRORS_BY_CODE)
