from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.inference.http.pair import Pair, run_pair


@pytest.fixture(scope="package")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with run_pair(tiny_model, tmp_path_factory.mktemp("http")) as running:
        yield running


@pytest.fixture
def http(pair: Pair) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pair.server.http, timeout=60) as client:
        yield client


@pytest.fixture
def client(pair: Pair) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, as an application would use it."""
    with openai.OpenAI(base_url=f"{pair.server.http}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
