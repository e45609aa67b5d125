"""What is computed once is shared by whoever may, and by nobody else: on a real server, adapters and salts included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients import generate, generate_all, request
from tests.inference.http.pair import ADAPTER, Pair, run_pair

PROMPT = [3 + index % 200 for index in range(50)]
"""Three blocks of 16 tokens, and two more."""


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with run_pair(tiny_model, tmp_path_factory.mktemp("prefixes")) as running:
        yield running


def test_a_beginning_is_shared_by_digest_and_salt(pair: Pair) -> None:
    address = pair.server.address
    first = generate(address, request(PROMPT))
    again = generate(address, request(PROMPT))
    assert (first.finished.usage.cached_tokens, again.finished.usage.cached_tokens) == (0, 48)
    assert again.started.cached_tokens == 48
    assert again.token_ids == first.token_ids
    other_adapter = generate(address, request(PROMPT, adapter=ADAPTER))
    other_salt = generate(address, request(PROMPT, cache_salt="mine"))
    assert other_adapter.finished.usage.cached_tokens == other_salt.finished.usage.cached_tokens == 0
    assert other_salt.token_ids == first.token_ids
    assert generate(address, request(PROMPT, adapter=ADAPTER)).token_ids == other_adapter.token_ids
    metrics = httpx.get(f"{pair.server.http}/metrics").text
    assert "vllm:prefix_cache_queries_total 250.0" in metrics
    assert "vllm:prefix_cache_hits_total 96.0" in metrics


def test_requests_that_run_share_with_those_that_come(pair: Pair) -> None:
    """A conversation goes on: the answer's own blocks are part of the next prompt's beginning."""
    address = pair.server.address
    question = [7 + index for index in range(20)]
    answer = generate(address, request(question, max_tokens=30))
    follow_ups = generate_all(address, [request([*question, *answer.token_ids, tail]) for tail in (5, 6, 7)])
    assert [each.finished.usage.cached_tokens for each in follow_ups] == [48, 48, 48]
