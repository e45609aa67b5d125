"""A client that goes away ends its request, whatever it was waiting for."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import httpx

from tests.conftest import TINY_BASE
from tests.inference.http.pair import ANSWER_TOKENS, Pair, ended_early, eventually

LONG = {"model": TINY_BASE, "prompt": "x", "max_tokens": ANSWER_TOKENS, "ignore_eos": True}


def test_leaving_a_stream(http: httpx.Client, pair: Pair) -> None:
    with ended_early(pair.server), http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
        assert next(answer.iter_lines()).startswith("data: ")


def test_leaving_while_the_whole_answer_is_awaited(pair: Pair) -> None:
    address = urlsplit(pair.server.http)
    body = json.dumps(LONG).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
    with ended_early(pair.server), socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + body)
        eventually(lambda: pair.server.stats().running == 1)
