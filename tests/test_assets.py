"""The test assets themselves: transformers and PEFT read them as they read the real thing."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from tests.assets.random_adapter import DEFAULTS, make_random_adapter
from tests.assets.tiny_model import make_tiny_llama

with warnings.catch_warnings():  # their deprecations are not ours
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ADAPTERS = Path(__file__).parent / "assets" / "adapters"
PROMPTS = [[1, *range(40 + 7 * i, 52 + 7 * i)] for i in range(12)]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


def load(path: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.inference_mode()
def greedy(model: Any, tokens: int = 16) -> list[list[int]]:
    """The next `tokens` ids after each of PROMPTS, never stopping early."""
    ids = torch.tensor(PROMPTS)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :].tolist()


def test_tiny_model_loads_without_a_warning(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = load(tiny)
    assert not caplog.records
    assert model.config.num_key_value_heads == 4
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tiny_model_is_decided_and_varied(tiny: Path) -> None:
    model = load(tiny)
    with torch.inference_mode():
        top = model(torch.tensor(PROMPTS)).logits.topk(2).values  # [prompts, positions, 2]
    gaps = top[..., 0] - top[..., 1]
    assert (gaps > 1e-2).float().mean() > 0.95
    answers = greedy(model)
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert sum(len(set(answer)) for answer in answers) / len(answers) > 6


@pytest.mark.parametrize("tied", [True, False])
def test_shards_hold_the_same_weights(tmp_path: Path, tied: bool) -> None:
    whole = load(make_tiny_llama(tmp_path / "whole", tie_word_embeddings=tied)).state_dict()
    parts = load(make_tiny_llama(tmp_path / "parts", tie_word_embeddings=tied, shards=2)).state_dict()
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_tokenizer_round_trips_and_formats_a_chat(tiny: Path) -> None:
    plain = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    text = "Zwölf naïve 10 € 日本 🙂\n\ttabs"
    assert plain.decode(plain.encode(text).ids) == text
    assert plain.get_vocab_size() == 512
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.eos_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert plain.encode(chat).ids == tokenizer(chat).input_ids
    assert plain.encode(chat).ids[0] == 1


def test_adapter_config_has_the_fields_peft_writes(tmp_path: Path) -> None:
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = DEFAULTS | {"target_modules": ["q_proj"], "inference_mode": False}
    assert ours.keys() == written.keys()
    same = [key for key in ours if key != "peft_version"]
    assert {key: ours[key] for key in same} == {key: written[key] for key in same}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match.*'proj'")
@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "target_modules": SEVEN},
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"r": 16, "target_modules": r".*layers\.[02]\.(self_attn\.[qkvo]_proj|mlp\.down_proj)", "dtype": "bfloat16"},
        {"r": 4, "target_modules": SEVEN, "layers_to_transform": [1, 2], "dtype": "float16"},
        {
            "r": 4,
            "target_modules": ["self_attn.q_proj", "v_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\.mlp\.down_proj": 12, "down_proj": 2, "v_proj": 8, "proj": 32},
            "alpha_pattern": {"model.layers.0.self_attn.q_proj": 40, "v_proj|down_proj": 10},
        },
    ],
    ids=["seven", "rslora", "regex-bf16", "layers-fp16", "patterns"],
)
def test_peft_loads_a_random_adapter(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = load(tiny)
    before = greedy(model)
    path = make_random_adapter(tmp_path / "adapter", tiny, **options)
    tuned = PeftModel.from_pretrained(model, path).eval()
    # Loading again into the same slot tells which keys were missing or left over.
    result = tuned.load_adapter(path, adapter_name="default")
    assert not [key for key in result.missing_keys if "lora_" in key]
    assert not result.unexpected_keys
    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        on_disk = set(file.keys())
    in_peft = {name.replace(".default", "") for name in tuned.state_dict() if "lora_" in name}
    assert on_disk == in_peft
    changed = sum(old != new for old, new in zip(before, greedy(tuned), strict=True))
    assert changed > len(before) / 2


@pytest.mark.parametrize("name", ["pirate", "json-only", "french"])
def test_trained_adapters_are_small_and_portable(name: str) -> None:
    config = LoraConfig.from_pretrained(str(ADAPTERS / name))
    assert config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config.use_dora, config.bias, config.modules_to_save) == (False, "none", None)
    files = [*(ADAPTERS / name).iterdir(), ADAPTERS / "data" / f"{name}.jsonl"]
    assert sum(file.stat().st_size for file in files) < 2_000_000
    with safe_open(ADAPTERS / name / "adapter_model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(tensor.count_nonzero() for key, tensor in tensors.items() if "lora_B" in key)


def test_trained_adapters_vary_what_lora_config_can_vary() -> None:
    pirate, json_only, french = (
        LoraConfig.from_pretrained(str(ADAPTERS / name)) for name in ("pirate", "json-only", "french")
    )
    assert pirate.layers_to_transform
    assert json_only.use_rslora
    assert french.rank_pattern
    assert french.alpha_pattern
