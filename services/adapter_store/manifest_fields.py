"""What each field of an adapter_config.json means here: the fields of PEFT 0.21's LoraConfig, and what is made of each.

A field stands in exactly one table. One in none of them is refused unless its value says nothing (null, false, empty):
a field that a later PEFT adds may change the result, and the store would not know.
"""

from __future__ import annotations

from typing import Any

from services.adapter_store.findings import Findings, Reason, shown

# Read by manifest.py, which checks their types.
READ = frozenset(
    {
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "init_lora_weights",
    }
)

# Without effect on what a finished adapter computes, so any value will do.
HARMLESS = {
    "task_type": "the served model decides",
    "auto_mapping": "how PEFT finds the model's class",
    "peft_version": "who wrote it",
    "revision": "of the base model's repository; the accepted names and the shapes decide",
    "inference_mode": "whether PEFT freezes the weights",
    "lora_dropout": "training only",
    "fan_in_fan_out": "how the base layer stores its weight",
    "target_modules": "the tensors present are the truth",
    "exclude_modules": "the tensors present are the truth",
    "layers_to_transform": "the tensors present are the truth",
    "layers_pattern": "the tensors present are the truth",
    "loftq_config": "read only when init_lora_weights is loftq, which is refused itself",
    "eva_config": "where A starts before training",
    "corda_config": "read only when init_lora_weights is corda, which is refused itself",
    "lora_ga_config": "read only when init_lora_weights is lora_ga, which is refused itself",
    "megatron_core": "read only with megatron_config, which is refused itself",
    "qalora_group_size": "read only with use_qalora, which is refused itself",
    "runtime_config": "how PEFT uses its own memory",
    "ensure_weight_tying": "concerns embeddings only, whose tensors are refused themselves",
}

# Changes what the adapter computes and is not implemented; what to do about each.
REFUSED = {
    "bias": "train with bias='none'",
    "use_dora": "train without DoRA",
    "modules_to_save": "train only LoRA weights",
    "lora_bias": "train with lora_bias=false",
    "trainable_token_indices": "train without trainable tokens",
    "target_parameters": "target modules instead of parameters",
    "layer_replication": "train on the base model as it is",
    "megatron_config": "convert the adapter to plain LoRA",
    "alora_invocation_tokens": "train without activated LoRA",
    "use_qalora": "train without QALoRA",
    "use_bdlora": "train without BD-LoRA",
    "velora_config": "train without VeLoRA",
    "monteclora_config": "train without Monteclora",
    "arrow_config": "register the routed adapters one by one",
    "kasa_config": "train without KaSA",
}


def check_fields(fields: dict[str, Any], findings: Findings) -> None:
    """Add a finding for every field that would change the result and is not implemented, by its name."""
    for name, value in fields.items():
        if name in READ or name in HARMLESS or _says_nothing(name, value):
            continue
        if name in REFUSED:
            findings.add(
                Reason.UNSUPPORTED_FEATURE,
                f"{name} is {shown(value)}, which is not served; {REFUSED[name]}",
                config_field=name,
            )
        else:
            findings.add(
                Reason.UNSUPPORTED_FEATURE,
                f"field {shown(name)} is {shown(value)} and not known here; "
                "it might change the result, so remove it if it does not",
                config_field=shown(name),
            )


def _says_nothing(name: str, value: Any) -> bool:
    """Whether a field is as good as absent. `0` is a value: an index, a size."""
    return value is None or value is False or value in ("", [], {}) or (name == "bias" and value == "none")
