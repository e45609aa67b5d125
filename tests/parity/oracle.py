"""What PEFT says: transformers' own reading of the GGUF file, with PEFT's own LoRA, in float32 on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig

NEAR_TIE = 2e-3
"""Two logits closer than this may change places by rounding: a differing token is excused there, and only there."""


@dataclass(frozen=True)
class Continuation:
    """PEFT's greedy tokens, and by how much the best logit led at each."""

    token_ids: list[int]
    leads: list[float]


class Oracle:
    """The base model and adapters of it, one at a time."""

    def __init__(self, gguf: Path) -> None:
        self._base = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ).eval()

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], count: int, adapter: Path | None = None) -> Continuation:
        """Greedy, `count` tokens, with the model's own KV cache."""
        with _Adapted(self._base, adapter) as model:
            cache, ids = None, torch.tensor([list(prompt)])
            tokens: list[int] = []
            leads: list[float] = []
            for _ in range(count):
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                best = out.logits[0, -1].topk(2)
                tokens.append(int(best.indices[0]))
                leads.append(float(best.values[0] - best.values[1]))
                cache, ids = out.past_key_values, best.indices[:1].view(1, 1)
        return Continuation(tokens, leads)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], adapter: Path | None = None) -> Tensor:
        """[tokens, vocab] float32, in one pass."""
        with _Adapted(self._base, adapter) as model:
            return model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]


class _Adapted:
    """The base model with an adapter on for the while, taken off without a trace."""

    def __init__(self, base: torch.nn.Module, adapter: Path | None) -> None:
        self._base = base
        self._adapter = adapter
        self._peft: PeftModel | None = None

    def __enter__(self) -> torch.nn.Module:
        if self._adapter is None:
            return self._base
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns that the base has no card; nothing of ours
            self._peft = PeftModel.from_pretrained(self._base, self._adapter).eval()
        return self._peft

    def __exit__(self, *_: object) -> None:
        if self._peft is not None:
            self._peft.unload()


def assert_same_tokens(found: Sequence[int], expected: Continuation, what: str) -> None:
    """The same tokens, up to the first near tie at which they part."""
    assert len(found) == len(expected.token_ids), f"{what}: {len(found)} tokens"
    for position, (ours, theirs) in enumerate(zip(found, expected.token_ids, strict=True)):
        if ours != theirs:
            lead = expected.leads[position]
            assert lead < NEAR_TIE, f"{what}: token {position} is {ours}, PEFT says {theirs} by {lead:.4f}"
            return
