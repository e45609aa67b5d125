"""What base weights of fewer bits gain and cost: decode steps beside those of the dtype itself, and for eight bits also
logits and tokens beside float32's along its own greedy answers. A quantized file's own blocks cost no bit of either.
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
from services.inference.model.weights import load_stored_weights
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


def fewer_bits(
    model: Path, bare: Bare, sizes: Sizes, setup: dict[str, Any], *, dtype: str, threads: int
) -> list[Result]:
    """bare: the model in its dtype, on the compiled path; model: as it is stored"""
    in_blocks = model.suffix == ".gguf" and dtype == "bfloat16"  # in float32 a file's blocks are made float32
    kinds = {"int8": "int8"} | ({"as_stored": "none"} if in_blocks else {})
    results = []
    for name, quantization in kinds.items():
        with says(f"decode, base weights {name}"):
            longest = CONTEXT + 1 + sizes.steps
            common: dict[str, Any] = {"backend": "compiled", "dtype": dtype, "threads": threads}
            fewer = Bare(model, **common, max_loras=8, longest=longest, quantization=quantization)
            results.append(_decode(name, bare, fewer, sizes, setup))
            del fewer
    with says("tokens of eight bits"):
        return [*results, _quality(model, setup, dtype=dtype, threads=threads)]


def _decode(name: str, bare: Bare, fewer: Bare, sizes: Sizes, setup: dict[str, Any]) -> Result:
    batches = {batch: (0, batch) for batch in (1, 8) if batch <= max(sizes.batches)}
    seconds: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for runner in (bare, fewer):
        runner.load_adapters(max(batches), 16)
    for _ in range(sizes.rounds):
        for batch, adapters in batches.items():
            for distinct in adapters:
                theirs, ours = (decode_seconds(of, batch, distinct, sizes.steps) for of in (bare, fewer))
                seconds.setdefault((batch, distinct), []).append((ours, theirs))
    ratios = {case: quartiles([ours / theirs for ours, theirs in found]) for case, found in seconds.items()}
    times = {case: [spread([each[i] * 1e3 for each in found]) for i in (0, 1)] for case, found in seconds.items()}
    figures = [
        Figure(
            f"decode, batch {batch}, {distinct} adapters: {name.replace('_', ' ')} ÷ {setup['dtype']}",
            ratio["median"],
            " ×",
            note=f"{ratio['q1']:g} to {ratio['q3']:g}; {_medians(times[batch, distinct])} ms",
        )
        for (batch, distinct), ratio in ratios.items()
    ]
    metrics = {
        "weight_bytes": fewer.weight_bytes,
        "build_seconds": fewer.seconds_to_build,
        "over_dtype": {f"{batch}x{distinct}": ratio for (batch, distinct), ratio in ratios.items()},
        "step_ms": {f"{batch}x{distinct}": ours for (batch, distinct), (ours, _) in times.items()},
    }
    return Result(f"engine_{name}_decode", setup, metrics, figures)


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
        self._decoder = compiled_decoder(model, load_stored_weights(path, model), cache, pool, threads, int8=int8)
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
