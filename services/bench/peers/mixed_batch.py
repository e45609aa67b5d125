"""PEFT's mixed batch, run in its own environment: `python mixed_batch.py MODEL NEW_TOKENS ADAPTER …`.

Loads the model in bf16 with every adapter and says `ready`. Each line on standard input is a JSON list of prompts,
one for each adapter; each is answered with the seconds that the batch took.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(path: str, new_tokens: int, adapters: list[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    names = [f"adapter{number}" for number in range(len(adapters))]
    model: Any = PeftModel.from_pretrained(base, adapters[0], adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, adapter_name=name)
    model.eval()
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    print("ready", flush=True)
    for line in sys.stdin:
        prompts = torch.tensor(json.loads(line))
        began = time.perf_counter()
        with torch.inference_mode():
            answers = model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), adapter_names=names, **settings
            )
        assert answers.shape[1] == prompts.shape[1] + new_tokens
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
