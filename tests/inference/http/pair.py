"""A store and a replica that pulls from it, with one adapter registered."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.assets.random_adapter import make_random_adapter
from tests.conftest import TINY_BASE, InferenceServer, StoreProcess, inference_config, run_inference, run_store

ADAPTER = "default/pirate"
ANSWER_TOKENS = 1500
"""More than anyone waits for: an answer that is shorter was ended early."""


@dataclass
class Pair:
    """digest: of the one version of ADAPTER"""

    server: InferenceServer
    store: StoreProcess
    adapter_dir: Path
    digest: str


@contextlib.contextmanager
def run_pair(model: Path, directory: Path) -> Iterator[Pair]:
    adapter_dir = make_random_adapter(directory / "adapter", model, base_model_name_or_path=TINY_BASE)
    with run_store(directory / "store") as store:
        store.register_base(TINY_BASE, (model / "config.json").read_text())
        version = store.register(ADAPTER, adapter_dir, TINY_BASE)
        config = inference_config(model, directory / "cache", adapter_store=store.address, threads=1)
        with run_inference(config) as server:
            yield Pair(server, store, adapter_dir, version.identity.digest)


def eventually(holds: Callable[[], bool], *, within: float = 60.0) -> None:
    """Ask until it holds; asking the engine waits for a step, so this does not spin."""
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline, f"did not come to hold within {within} s"


@contextlib.contextmanager
def ended_early(server: InferenceServer) -> Iterator[None]:
    """Whatever is started inside must have been stopped by its end, well before ANSWER_TOKENS, and hold nothing."""
    before = server.stats().generation_tokens
    yield
    eventually(lambda: server.stats().running == server.stats().waiting == 0)
    stats = server.stats()
    assert stats.generation_tokens - before < ANSWER_TOKENS
    assert stats.blocks_free == stats.blocks
