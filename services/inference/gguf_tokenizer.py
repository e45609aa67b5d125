"""The tokenizer inside a GGUF file, built with the tokenizers library. Byte-level BPE only."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from services.common.errors import Unimplemented
from services.common.gguf_config import gguf_field

_CONTROL, _USER_DEFINED = 3, 4


def tokenizer_from_gguf(reader: Any) -> Tokenizer:
    """Build it from the file's vocabulary and merges. Raises Unimplemented for kinds that are not known here."""
    kind, pre = gguf_field(reader, "tokenizer.ggml.model"), gguf_field(reader, "tokenizer.ggml.pre", "")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise Unimplemented(
            "UNSUPPORTED_TOKENIZER",
            f"model: GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not served; give the Hugging Face directory",
            field="model",
        )
    tokens: list[str] = gguf_field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in gguf_field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre]())
    tokenizer.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, gguf_field(reader, "tokenizer.ggml.token_type", []), strict=False))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in typed if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token) for token, kind in typed if kind == _USER_DEFINED])
    if gguf_field(reader, "tokenizer.ggml.add_bos_token", False):
        bos = gguf_field(reader, "tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _gpt2() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _smollm() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Digits(individual_digits=True), *_gpt2()]


_PRE_TOKENIZERS = {"gpt-2": _gpt2, "smollm": _smollm}
