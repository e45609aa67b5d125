"""Names of an adapter's tensors, and the modules they belong to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_PEFT_PREFIX = "base_model.model."
# How wrappers around a decoder spell its root; the decoder's own name for it is `model.`.
_WRAPPED_ROOTS = ("model.language_model.model.", "model.language_model.", "language_model.model.")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# Copies of base weights that PEFT's save_embedding_layers adds; these names and no others.
_BASE_COPIES = ("model.embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
_LAYER = re.compile(r"model\.layers\.(?P<layer>0|[1-9][0-9]{0,8})\.(?P<inner>.+)")
# What a tensor that is no lora_A or lora_B says about the adapter, by a part of its name.
_FEATURES = {
    "lora_embedding_A": "LoRA on embeddings is not served; leave embed_tokens and lm_head out of target_modules",
    "lora_embedding_B": "LoRA on embeddings is not served; leave embed_tokens and lm_head out of target_modules",
    "lora_magnitude_vector": "DoRA is not served; train with use_dora=false",
    "modules_to_save": "modules_to_save is not served; train only LoRA weights",
    "token_adapter": "trainable tokens are not served; train without trainable_token_indices",
    "trainable_tokens_delta": "trainable tokens are not served; train without trainable_token_indices",
    "lora_A.bias": "lora_bias is not served; train with lora_bias=false",
    "lora_B.bias": "lora_bias is not served; train with lora_bias=false",
    "lora_diag": "KaSA is not served; train without it",
}
_EMBEDDINGS = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class LoraKey:
    """A lora_A or lora_B weight.

    module: full name in the base model's profile
    trained_as: the module's name in the model that was trained; PEFT matches its patterns against this one
    """

    module: str
    trained_as: str
    side: Literal["A", "B"]


@dataclass(frozen=True, slots=True)
class BaseCopy:
    """A copy of base weights, to be skipped."""

    name: str


@dataclass(frozen=True, slots=True)
class UnservedKey:
    """A tensor of a feature that is not served; `why` says which, and what to do."""

    why: str


def normalise(key: str) -> LoraKey | BaseCopy | UnservedKey | None:
    """What a tensor's name means; None when it means nothing here. The one place that knows prefixes and suffixes."""
    trained_as = key.removeprefix(_PEFT_PREFIX)
    name = trained_as
    for root in _WRAPPED_ROOTS:
        if name.startswith(root):
            name = "model." + name.removeprefix(root)
            break
    if name in _BASE_COPIES:
        return BaseCopy(name)
    for part, why in _FEATURES.items():
        if part in name:
            return UnservedKey(why)
    if name.startswith(_EMBEDDINGS):
        return UnservedKey("weights of embed_tokens and lm_head are not served; leave them out of target_modules")
    match = _LORA.fullmatch(name)
    if match is None:
        return None
    trained = _LORA.fullmatch(trained_as)
    assert trained is not None  # only the start was rewritten
    return LoraKey(match["module"], trained["module"], "A" if match["side"] == "A" else "B")


def split_layer(module: str) -> tuple[int, str] | None:
    """Layer index and name within the layer: (3, 'self_attn.q_proj'); None for a module outside the layers."""
    match = _LAYER.fullmatch(module)
    return (int(match["layer"]), match["inner"]) if match else None
