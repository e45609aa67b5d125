"""A tiny random Llama on disk, in the layout of a Hugging Face checkpoint; needs no download and no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Enough text for a few hundred merges, with some bytes beyond ASCII so that tokens can split a character.
CORPUS = [
    "The harbour was quiet in the morning, and the boats moved slowly against the old stone wall.",
    "She asked the baker how the bread was made, and he answered that patience was the only secret.",
    "When the rain stopped, the children went out again and counted the birds on the wire.",
    "Please write a short answer to this question: what is the name of the river that runs through the town?",
    "A library holds more than books; it holds the hours that people spent reading them.",
    "user assistant system message prompt adapter model token weight layer rank alpha scale request response",
    "Le café était fermé, mais la boulangère connaissait déjà le goût de l'été à côté du château.",
    "Zwölf Boxkämpfer jagen über den großen Deich; schöne Grüße aus Köln, naïve coöperation, 10 €, 25 °C.",
    '{"answer": "yes", "count": 12, "items": [1, 2, 3], "nested": {"key": "value"}}',
    "for index in range(10): total += values[index] * 0.5  # then return the total",
]


def build_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """A byte-level BPE: specials first (ids 0..2), then the 256 bytes, then merges learned from CORPUS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def make_tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    vocab_size: int = 512,
    hidden_size: int = 128,
    intermediate_size: int = 256,
    layers: int = 3,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 16,
    tie_word_embeddings: bool = True,
    rope_theta: float = 10_000.0,
    max_position_embeddings: int = 2048,
    shards: int = 1,
    std: float = 0.15,
) -> Path:
    """Write a random fp32 Llama and its tokenizer into `path`, and return `path`.

    `std` is that of every matrix: large enough that attention is far from uniform and that greedy decoding depends
    on the whole context. With `shards` > 1 the weights go into that many files and model.safetensors.index.json.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocab_size)
    vocab_size = tokenizer.get_vocab_size()
    eos = tokenizer.token_to_id("<|im_end|>")
    bos = tokenizer.token_to_id("<|im_start|>")
    pad = tokenizer.token_to_id("<|endoftext|>")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "dtype": "float32",
        "eos_token_id": eos,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": pad,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "rope_theta": rope_theta,
        "tie_word_embeddings": tie_word_embeddings,
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    write_json(path / "config.json", config)
    write_json(path / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad})
    write_json(
        path / "tokenizer_config.json",
        {
            "bos_token": "<|im_start|>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": max_position_embeddings,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    tokenizer.save(str(path / "tokenizer.json"))
    save_weights(path, random_weights(config, seed=seed, std=std), shards)
    return path


def random_weights(config: dict[str, Any], *, seed: int, std: float) -> dict[str, torch.Tensor]:
    """Every tensor of a LlamaForCausalLM, fp32, under its Hugging Face name; linears are [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    def norm() -> torch.Tensor:
        # Not all ones, so that a forgotten norm weight shows.
        return 1.0 + 0.1 * torch.randn(hidden, generator=generator)

    weights = {"model.embed_tokens.weight": matrix(vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        weights |= {
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.self_attn.q_proj.weight": matrix(q_rows, hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(kv_rows, hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(kv_rows, hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, q_rows),
            f"{layer}.post_attention_layernorm.weight": norm(),
            f"{layer}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{layer}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{layer}.mlp.down_proj.weight": matrix(hidden, inner),
        }
    weights["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(vocab, hidden)
    return weights


def save_weights(path: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    """One model.safetensors, or `shards` files of about as many tensors each and their index."""
    if shards == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    where: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: weights[name] for name in part}, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
