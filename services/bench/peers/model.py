"""The model as the peers read it: a Hugging Face directory, written from the GGUF file that we serve."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from services.common.gguf_config import config_from_gguf, gguf_field, open_gguf
from services.inference.gguf_tokenizer import tokenizer_from_gguf
from services.inference.model.config import load_config
from services.inference.model.weights import load_weights


def write_directory(gguf: Path, directory: Path) -> Path:
    """Weights in bf16 (q and k in Hugging Face's order of rows), config and tokenizer; kept when it is there."""
    marker = directory / "model.safetensors"
    if marker.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    reader = open_gguf(gguf)
    config = config_from_gguf(reader) | {"torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer_from_gguf(reader).save(str(directory / "tokenizer.json"))
    tokens = gguf_field(reader, "tokenizer.ggml.tokens")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokens[gguf_field(reader, "tokenizer.ggml.eos_token_id")],
        "chat_template": gguf_field(reader, "tokenizer.chat_template"),
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    weights = load_weights(gguf, load_config(gguf, dtype="bfloat16"))
    part = marker.with_suffix(".part")
    contiguous = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(contiguous, part, metadata={"format": "pt"})
    part.rename(marker)
    return directory
