"""What base weights in eight bits gain and cost: decode steps beside those of the dtype itself, and logits and tokens
beside float32's along its own greedy answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_kernels import BASE_ROW
from lora_kernels.cpu import StepBatch
from services.bench.engine.decode import CONTEXT, Sizes, decode_seconds
from services.bench.engine.steps import Bare
from services.bench.progress import says
from services.bench.results import Figure, Result, quartiles, spread
from services.common.gguf_config import open_gguf
from services.inference.adapters.slot_pool import SlotPool
from services.inference.model.compiled_runner import compiled_cache, compiled_decoder
from services.inference.model.config import load_config
from services.inference.model.lora import group_shapes
from services.inference.model.weights import load_weights
from services.inference.tokenizer import ChatTurn, Tokenizer

TOKENS, BLOCK_SIZE, POSITIONS = 64, 16, 256
PROMPTS = (
    "What is the capital of France?",
    "Explain what a database index is.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Tell me a short story about a fox and a lighthouse.",
    "What is 12 times 12, and how do you know?",
    "Give me three tips for a good night's sleep.",
)


def eight_bits(
    model: Path, bare: Bare, sizes: Sizes, setup: dict[str, Any], *, dtype: str, threads: int
) -> list[Result]:
    """bare: the model in its dtype, on the compiled path"""
    with says("building the runner in eight bits"):
        longest = CONTEXT + 1 + sizes.steps
        eight = Bare(
            model, backend="compiled", dtype=dtype, threads=threads, max_loras=8, longest=longest, quantization="int8"
        )
    results = [_decode(bare, eight, sizes, setup)]
    del eight
    with says("tokens of eight bits"):
        return [*results, _quality(model, setup, dtype=dtype, threads=threads)]


def _decode(bare: Bare, eight: Bare, sizes: Sizes, setup: dict[str, Any]) -> Result:
    batches = [batch for batch in (1, 8) if batch <= max(sizes.batches)]
    seconds: dict[int, list[tuple[float, float]]] = {batch: [] for batch in batches}
    with says("decode in eight bits"):
        for _ in range(sizes.rounds):
            for batch in batches:
                theirs, ours = (decode_seconds(of, batch, 0, sizes.steps) for of in (bare, eight))
                seconds[batch].append((ours, theirs))
    ratios = {batch: quartiles([ours / theirs for ours, theirs in found]) for batch, found in seconds.items()}
    times = {batch: [spread([each[i] * 1e3 for each in found]) for i in (0, 1)] for batch, found in seconds.items()}
    figures = [
        Figure(
            f"decode, batch {batch}: int8 ÷ {setup['dtype']}",
            ratio["median"],
            " ×",
            note=f"{ratio['q1']:g} to {ratio['q3']:g}; {_medians(times[batch])} ms",
        )
        for batch, ratio in ratios.items()
    ]
    metrics = {
        "weight_bytes": eight.weight_bytes,
        "build_seconds": eight.seconds_to_build,
        "over_dtype": {f"{batch}": ratio for batch, ratio in ratios.items()},
        "step_ms": {f"{batch}": ours for batch, (ours, _) in times.items()},
    }
    return Result("engine_int8_decode", setup, metrics, figures)


def _medians(times: Sequence[dict[str, float]]) -> str:
    return " and ".join(f"{each['median']:g}" for each in times)


def _quality(path: Path, setup: dict[str, Any], *, dtype: str, threads: int) -> Result:
    tokenizer = Tokenizer.load(path, frozenset())
    prompts = [tokenizer.encode_chat([ChatTurn("user", text)]) for text in PROMPTS]
    exact = _Model(path, "float32", threads, int8=False)
    answers = [exact.answer(prompt) for prompt in prompts]
    figures, metrics = [], {}
    for name, other in (
        (dtype, _Model(path, dtype, threads, int8=False)),
        ("int8", _Model(path, dtype, threads, int8=True)),
    ):
        pairs = [
            (model.logits([*prompt, *tokens])[len(prompt) - 1 : -1] for model in (exact, other))
            for prompt, tokens in zip(prompts, answers, strict=True)
        ]
        theirs, ours = (torch.cat(rows) for rows in zip(*pairs, strict=True))
        wrong = (ours - theirs).abs()
        agree = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
        divergence = float((theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean())
        metrics[name] = {
            "positions": len(ours),
            "greedy_agreement": agree,
            "logit_error_mean": float(wrong.mean()),
            "logit_error_max": float(wrong.max()),
            "divergence": divergence,
        }
        note = f"logits differ by {wrong.mean():.3f}, at most {wrong.max():.2f}; divergence {divergence:.1e}"
        figures.append(Figure(f"greedy tokens that are float32's, {name}", 100 * agree, " %", note=note))
    return Result("engine_int8_quality", setup | {"prompts": len(prompts), "tokens": TOKENS}, metrics, figures)


class _Model:
    """The base model on the compiled path, one sequence at a time."""

    def __init__(self, path: Path, dtype: str, threads: int, *, int8: bool) -> None:
        model = load_config(path, dtype=dtype, max_model_len=POSITIONS)
        pool = SlotPool(group_shapes(model), model.num_layers, 1, 16, model.dtype)
        self._blocks = np.arange(1, 1 + POSITIONS // BLOCK_SIZE, dtype=np.int32)[None]
        cache = compiled_cache(model, 1 + self._blocks.size, BLOCK_SIZE)
        self._decoder = compiled_decoder(model, load_weights(path, model), cache, pool, threads, int8=int8)
        open_gguf.cache_clear()

    def answer(self, prompt: Sequence[int]) -> list[int]:
        """Greedy, `TOKENS` of them, whatever they are."""
        tokens: list[int] = []
        for _ in range(TOKENS):
            done = len(prompt) + len(tokens) - 1 if tokens else 0
            tokens.append(int(self.logits([*prompt, *tokens][done:], done)[-1].argmax()))
        return tokens

    def logits(self, token_ids: Sequence[int], done: int = 0) -> Tensor:
        """[tokens, vocab], after the first `done` of the sequence have been computed."""
        rows = np.arange(len(token_ids), dtype=np.int32)
        none = np.zeros_like(rows)
        batch = StepBatch(np.array(token_ids, np.int32), rows + done, none + BASE_ROW, none, self._blocks, rows)
        return self._decoder.step(batch).logits.clone()
