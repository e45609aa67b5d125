"""The engine's runner by itself: requests put together by hand, stepped and timed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from services.adapter_store.packing import into, pack
from services.adapter_store.records import Overrides
from services.adapter_store.validation import validate
from services.bench.adapters import linear_shapes as bench_shapes
from services.bench.adapters import random_adapter
from services.bench.fleet import DEVIATION
from services.common.gguf_config import open_gguf
from services.common.process import settle
from services.common.profile import linear_shapes, profile_from_config
from services.inference.adapters.packed_adapter import BaseModelShapes, PackedAdapter
from services.inference.adapters.slot_pool import SlotPool
from services.inference.config import AdapterConfig, ServerConfig
from services.inference.engine.interfaces import Runner, ScheduledRequest
from services.inference.engine.request import Request, SamplingParams, StoppingParams
from services.inference.model.backend import build_runner
from services.inference.model.compiled_runner import CompiledRunner
from services.inference.model.config import ModelConfig, load_config
from services.inference.model.lora import group_shapes
from services.inference.model.sampler import Sampler
from services.inference.model.weights import expected_shapes

MAX_RANK = 64
FIRST_ID = 20


@dataclasses.dataclass(slots=True)
class Sequenced:
    """A request, and where its adapter lies in the pool."""

    request: Request
    slot: int | None


class Bare:
    """A runner over a pool, without scheduler, server or store.

    seconds_to_build: reading and packing the weights
    """

    def __init__(
        self,
        path: Path,
        *,
        backend: str,
        dtype: str,
        threads: int,
        max_loras: int,
        longest: int,
        quantization: str = "none",
    ) -> None:
        self.model: ModelConfig = load_config(path, dtype=dtype)
        room = AdapterConfig(max_loras=max_loras, max_lora_rank=MAX_RANK)
        self.config = ServerConfig(
            model=path, dtype=dtype, quantization=quantization, cpu_backend=backend, threads=threads, adapters=room
        )
        self._blocks_each = -(-longest // self.config.block_size)
        self._num_blocks = 1 + max_loras * self._blocks_each
        self.pool = SlotPool(group_shapes(self.model), self.model.num_layers, max_loras, MAX_RANK, self.model.dtype)
        began = time.perf_counter()
        self.runner: Runner = build_runner(self.config, self.model, self._num_blocks, self.pool, Sampler())
        self.seconds_to_build = time.perf_counter() - began
        open_gguf.cache_clear()  # this and the next as the service does
        settle()

    @property
    def weight_bytes(self) -> int:
        """Read by every step, as they lie in memory."""
        return self.runner.weight_bytes if isinstance(self.runner, CompiledRunner) else self.dtype_bytes

    @property
    def dtype_bytes(self) -> int:
        """The same in the model's dtype: all but an embedding that is not also the head, of which rows are read."""
        skipped = set() if self.model.tie_word_embeddings else {"model.embed_tokens.weight"}
        shapes = {name: shape for name, shape in expected_shapes(self.model).items() if name not in skipped}
        return sum(int(np.prod(shape)) for shape in shapes.values()) * self.model.dtype.itemsize

    @property
    def cache_bytes(self) -> int:
        return self._num_blocks * self.config.block_size * self.model.kv_bytes_per_token

    @property
    def pool_bytes(self) -> int:
        tensors = [
            tensor for groups in self.pool.weights for weights in groups.values() for tensor in (weights.a, *weights.b)
        ]
        return sum(tensor.nbytes for tensor in tensors)

    def load_adapters(self, count: int, rank: int) -> int:
        """Fill that many slots with adapters of this rank: the bytes of one."""
        for slot in list(self.pool.slots()):
            self.pool.evict(slot.digest)
        first = self._adapter(rank)
        for number in range(count):
            adapter = copy.copy(first)  # the same values, in memory of their own once they lie in the pool
            adapter.digest = f"{first.digest}-{number}"
            self.pool.load(adapter)
        shapes = bench_shapes(self.model.hf_config).values()
        return rank * sum(map(sum, shapes)) * self.model.dtype.itemsize

    def sequences(self, batch: int, distinct: int, context: int, *, computed: int = 0) -> list[Sequenced]:
        """Requests of `context` prompt tokens, over that many adapters in turn; 0: the base model.

        computed: how many of the tokens are taken to be in the cache
        """
        slots = [slot.index for slot in self.pool.slots()][:distinct]
        rng = np.random.default_rng(batch)
        made = []
        for number in range(batch):
            prompt = rng.integers(FIRST_ID, self.model.vocab_size, context).tolist()
            request = Request(str(number), prompt, SamplingParams(), StoppingParams(max_tokens=1 << 20))
            first = 1 + number * self._blocks_each
            request.num_computed_tokens = computed
            request.block_ids = list(range(first, first + self._blocks_each))
            made.append(Sequenced(request, slots[number % distinct] if distinct else None))
        return made

    def step(self, sequences: Sequence[Sequenced]) -> float:
        """Compute everything that is uncomputed and append a token to each: the seconds it took."""
        scheduled = [
            ScheduledRequest(each.request, each.request.num_uncomputed_tokens, each.slot) for each in sequences
        ]
        began = time.perf_counter()
        tokens = self.runner.launch(scheduled).read()
        took = time.perf_counter() - began
        for each, token in zip(sequences, tokens, strict=True):
            assert token is not None
            assert token.error is None, token.error
            each.request.num_computed_tokens = len(each.request.token_ids)
            each.request.token_ids.append(token.token_id)
        return took

    def _adapter(self, rank: int) -> PackedAdapter:
        shapes = BaseModelShapes(linear_shapes(self.model.hf_config), MAX_RANK, self.model.dtype)
        return PackedAdapter(*_packed(self.model, rank), shapes)


def _packed(model: ModelConfig, rank: int) -> tuple[bytearray, str]:
    """A random adapter as the store sends it, and its digest."""
    files = random_adapter(bench_shapes(model.hf_config), rank=rank, base_model=model.name, deviation=DEVIATION)
    profile = profile_from_config(model.name, json.dumps(dict(model.hf_config)))
    weights = memoryview(files.weights)
    checked = validate(files.config, weights, profile, Overrides())
    digest = f"sha256:{hashlib.sha256(files.config).hexdigest()}"
    data = bytearray()
    pack(checked.modules, weights, content_digest=digest, base_model=model.name, write_at=into(data))
    return data, digest
