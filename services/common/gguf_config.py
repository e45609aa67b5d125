"""A GGUF file's metadata as a Hugging Face config: what profiles and the model read, whatever file the model is in."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from services.common.errors import InvalidArgument, Unimplemented


@lru_cache(maxsize=1)
def open_gguf(path: Path) -> Any:
    """A gguf.GGUFReader over `path`, kept for the next caller: parsing the vocabulary takes a second or two.

    Raises InvalidArgument when it is no GGUF file.
    """
    from gguf import GGUFReader  # costs a third of a second; callers that need no GGUF do not pay it

    try:
        return GGUFReader(path)
    except (ValueError, OSError) as error:
        raise InvalidArgument("INVALID_GGUF", f"{path} is no readable GGUF file: {error}", field="model") from error


def gguf_field(reader: Any, key: str, default: Any = None) -> Any:
    """One metadata value, or `default`."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def config_from_gguf(reader: Any) -> dict[str, Any]:
    """The config.json a Hugging Face directory of this model would have."""
    architecture = gguf_field(reader, "general.architecture")
    if architecture != "llama":
        raise Unimplemented(
            "UNSUPPORTED_ARCHITECTURE",
            f"model: GGUF architecture {architecture!r} is not served; served is 'llama'",
            field="model",
            architecture=architecture,
        )

    def required(key: str) -> Any:
        value = gguf_field(reader, f"llama.{key}")
        if value is None:
            raise InvalidArgument("INVALID_GGUF", f"model: the GGUF file lacks llama.{key}", field="model")
        return value

    names = {tensor.name for tensor in reader.tensors}
    if "rope_freqs.weight" in names:
        raise Unimplemented("UNSUPPORTED_ROPE", "model: GGUF files with rope_freqs are not served; give the directory")
    heads, hidden = required("attention.head_count"), required("embedding_length")
    head_dim = gguf_field(reader, "llama.attention.key_length", hidden // heads)
    if gguf_field(reader, "llama.rope.dimension_count", head_dim) != head_dim:
        raise Unimplemented("UNSUPPORTED_ROPE", "model: partial rope is not served", field="model")
    if gguf_field(reader, "llama.rope.scaling.type", "none") != "none":
        raise Unimplemented("UNSUPPORTED_ROPE", "model: rope scaling in GGUF is not served; give the directory")
    eos = gguf_field(reader, "tokenizer.ggml.eos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": required("feed_forward_length"),
        "num_hidden_layers": required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf_field(reader, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": required("context_length"),
        "rms_norm_eps": required("attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf_field(reader, "llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in names,
        "vocab_size": len(gguf_field(reader, "tokenizer.ggml.tokens", [])),
        "bos_token_id": gguf_field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
    }
