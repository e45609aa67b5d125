"""How long the torch path's step takes: `python -m services.bench.torch_step [--dtype bfloat16] [--threads 2]`.

Random weights of SmolLM2-135M's shapes and rank-16 adapters on every linear; nothing is downloaded. A JSON line for
each of: decode at 1 and 8 sequences of 128 tokens, prefill of 8 × 64, each for the base model and with an adapter a
sequence. Milliseconds a step, without sampling's random draws (greedy).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from services.bench.results import Result, spread
from services.common.profile import linear_shapes
from services.inference.adapters.packed_adapter import ModuleTensors, PackedAdapter
from services.inference.adapters.slot_pool import SlotPool
from services.inference.engine.interfaces import ScheduledRequest
from services.inference.engine.request import Request, SamplingParams, StoppingParams
from services.inference.model.attention import KVCache
from services.inference.model.config import DTYPES, ModelConfig, RopeScaling
from services.inference.model.decoder import Decoder
from services.inference.model.lora import group_shapes
from services.inference.model.runner import ModelRunner
from services.inference.model.sampler import Sampler
from services.inference.model.weights import expected_shapes

RANK, ADAPTERS, BLOCK_SIZE, CONTEXT, PROMPT = 16, 8, 16, 128, 64
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
}


class RandomAdapter(PackedAdapter):
    def __init__(self, digest: str, made: torch.Generator) -> None:
        self.digest = digest
        shapes = linear_shapes(HF_CONFIG)
        self.ranks = {name.removeprefix("model.layers.0."): RANK for name in shapes if ".layers.0." in name}
        self._random = {
            name: ModuleTensors(
                RANK,
                1.0,
                torch.randn(RANK, shape.in_features, generator=made) / shape.in_features**0.5,
                torch.randn(RANK, shape.out_features, generator=made) / 10,
            )
            for name, shape in shapes.items()
        }

    def module(self, layer: int, linear: str) -> ModuleTensors | None:
        return self._random[f"model.layers.{layer}.{linear}"]


def model_config(dtype: torch.dtype) -> ModelConfig:
    return ModelConfig(
        name="smollm2-135m",
        architecture="LlamaForCausalLM",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        rope_scaling=RopeScaling(),
        tie_word_embeddings=True,
        max_model_len=2048,
        eos_token_ids=frozenset({0}),
        dtype=dtype,
        hf_config=HF_CONFIG,
    )


def build_runner(config: ModelConfig) -> ModelRunner:
    made = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=made) / shape[-1] ** 0.5)
        for name, shape in expected_shapes(config).items()
    }
    blocks = ADAPTERS * -(-CONTEXT // BLOCK_SIZE)
    cache = KVCache(config.num_layers, blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim, config.dtype)
    pool = SlotPool(group_shapes(config), config.num_layers, ADAPTERS, RANK, config.dtype)
    for index in range(ADAPTERS):
        pool.load(RandomAdapter(f"adapter {index}", made))
    decoder = Decoder(config, {name: tensor.to(config.dtype) for name, tensor in weights.items()})
    return ModelRunner(decoder, cache, pool, Sampler())


def step(sequences: int, context: int, new: int, *, adapters: bool) -> list[ScheduledRequest]:
    """`sequences` requests whose last `new` of `context` tokens are to be computed."""
    blocks = CONTEXT // BLOCK_SIZE
    scheduled = []
    for index in range(sequences):
        prompt = [(index * 977 + position * 31) % 49152 for position in range(context)]
        request = Request(str(index), prompt, SamplingParams(), StoppingParams(100))
        request.num_computed_tokens = context - new
        request.block_ids = list(range(index * blocks, (index + 1) * blocks))
        scheduled.append(ScheduledRequest(request, new, index if adapters else None))
    return scheduled


def milliseconds(runner: ModelRunner, scheduled: Sequence[ScheduledRequest], repeats: int) -> dict[str, float]:
    taken = []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        runner.run(scheduled)
        if repeat:  # the first one warms the caches
            taken.append((time.perf_counter() - began) * 1e3)
    return spread(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runner = build_runner(model_config(DTYPES[args.dtype]))
    for name, sequences, context, new in (
        ("prefill", 8, PROMPT, PROMPT),
        ("decode", 8, CONTEXT, 1),
        ("decode", 1, CONTEXT, 1),
    ):
        for adapters in (False, True):
            scheduled = step(sequences, context, new, adapters=adapters)
            found = milliseconds(runner, scheduled, args.repeats if new == 1 else max(1, args.repeats // 5))
            setup = {"phase": name, "sequences": sequences, "adapters": sequences if adapters else 0}
            setup |= {"dtype": args.dtype, "threads": args.threads, "context": context, "rank": RANK}
            print(Result("torch step", setup, {"step_ms": found}).to_json(), flush=True)


if __name__ == "__main__":
    main()
