"""What a base model looks like to an adapter: its linears by full name, with exact shapes.

The store checks uploads against a registered profile; a replica checks what it pulls against its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from services.common.errors import FailedPrecondition, InvalidArgument, Unimplemented
from services.common.references import check_name

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
MAX_LORA_RANK = 512
DEFAULT_LORA_RANK = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths of a linear: y [out] = W [out, in] · x [in]."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseModelProfile:
    """A base model as adapters see it. `modules` maps a linear's full name to its shape, in layer order."""

    name: str
    architecture: str
    num_layers: int
    vocab_size: int
    modules: dict[str, Shape]
    accepted_names: tuple[str, ...]
    max_lora_rank: int = DEFAULT_LORA_RANK
    lora_extra_vocab_size: int = 0
    fingerprint: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))  # keys unsorted: the order of modules is the layers'

    @classmethod
    def from_json(cls, text: str) -> BaseModelProfile:
        fields = json.loads(text)
        fields["modules"] = {name: Shape(**shape) for name, shape in fields["modules"].items()}
        fields["accepted_names"] = tuple(fields["accepted_names"])
        return cls(**fields)


def profile_from_config(
    name: str,
    config_json: str,
    *,
    accepted_names: Sequence[str] = (),
    max_lora_rank: int = DEFAULT_LORA_RANK,
    lora_extra_vocab_size: int = 0,
    fingerprint: str = "",
) -> BaseModelProfile:
    """Derive a profile from a Hugging Face config.json.

    Raises InvalidArgument (bad JSON, missing or senseless fields) and Unimplemented (an architecture not served).
    """
    check_name(name, field="name", what="base model name")
    if not 1 <= max_lora_rank <= MAX_LORA_RANK:
        raise InvalidArgument(
            "INVALID_MAX_LORA_RANK",
            f"max_lora_rank is {max_lora_rank}; it must be 1 to {MAX_LORA_RANK}",
            field="max_lora_rank",
        )
    if lora_extra_vocab_size:
        raise Unimplemented.not_yet("lora_extra_vocab_size above 0")
    config = _parse(config_json)
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else "?"
    if architecture not in ARCHITECTURES:
        raise Unimplemented(
            "UNSUPPORTED_ARCHITECTURE",
            f"config_json: architecture {architecture!r} is not served; served are {', '.join(ARCHITECTURES)}",
            field="config_json",
            architecture=architecture,
        )
    return BaseModelProfile(
        name=name,
        architecture=architecture,
        num_layers=_positive(config, "num_hidden_layers"),
        vocab_size=_positive(config, "vocab_size"),
        modules=dict(linear_shapes(config)),
        accepted_names=tuple(dict.fromkeys([name, *accepted_names])),
        max_lora_rank=max_lora_rank,
        lora_extra_vocab_size=lora_extra_vocab_size,
        fingerprint=fingerprint,
    )


def linear_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Every linear of the decoder layers by full name, in layer order, from a config's fields."""
    hidden = _positive(config, "hidden_size")
    heads = _positive(config, "num_attention_heads")
    kv_heads = _positive(config, "num_key_value_heads", heads)
    head_dim = head_dim_of(config)
    intermediate = _positive(config, "intermediate_size")
    in_layer = {
        "self_attn.q_proj": Shape(hidden, heads * head_dim),
        "self_attn.k_proj": Shape(hidden, kv_heads * head_dim),
        "self_attn.v_proj": Shape(hidden, kv_heads * head_dim),
        "self_attn.o_proj": Shape(heads * head_dim, hidden),
        "mlp.gate_proj": Shape(hidden, intermediate),
        "mlp.up_proj": Shape(hidden, intermediate),
        "mlp.down_proj": Shape(intermediate, hidden),
    }
    layers = _positive(config, "num_hidden_layers")
    return {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in in_layer.items()}


def head_dim_of(config: Mapping[str, Any]) -> int:
    """A head's width, which a config need not say."""
    return _positive(config, "head_dim", _positive(config, "hidden_size") // _positive(config, "num_attention_heads"))


def longest_context(config: Mapping[str, Any]) -> int:
    """The model's length; within a sliding window, where there is one, since windows are not served."""
    positions = int(config.get("max_position_embeddings", 2048))
    window = config.get("sliding_window")
    return min(positions, int(window)) if window else positions


def check_parts(config: Mapping[str, Any], parts: int, fully_sharded: bool = False) -> None:
    """Whether a model can be cut into that many parts, and with `fully_sharded` all of its adapters.

    Raises FailedPrecondition naming what cannot be divided.
    """
    heads = _positive(config, "num_attention_heads")
    widths = {
        "attention heads": heads,
        "key-value heads": _positive(config, "num_key_value_heads", heads),
        "intermediate size": _positive(config, "intermediate_size"),
    }
    if fully_sharded:
        widths["hidden size, which --fully-sharded-loras cuts,"] = _positive(config, "hidden_size")
    for name, width in widths.items():
        if width % parts:
            raise FailedPrecondition(
                "NOT_DIVISIBLE",
                f"--tensor-parallel-size is {parts}: the model's {name} ({width}) cannot be divided by it",
                field="tensor_parallel_size",
            )


def check_profile(profile: BaseModelProfile, modules: Mapping[str, Shape], vocab_size: int, max_lora_rank: int) -> None:
    """Whether a replica with this model and room meets what registration foresaw of it.

    Raises FailedPrecondition naming the first thing that differs.
    """
    if profile.vocab_size != vocab_size:
        differs = f"a vocabulary of {vocab_size}, where the profile has {profile.vocab_size}"
    elif set(profile.modules) != set(modules):
        differs = f"{len(modules)} linears, where the profile has {len(profile.modules)}"
    elif wrong := next((name for name, shape in profile.modules.items() if modules[name] != shape), None):
        here, there = modules[wrong], profile.modules[wrong]
        differs = (
            f"{wrong} of {here.in_features} → {here.out_features}, where the profile has "
            f"{there.in_features} → {there.out_features}"
        )
    elif max_lora_rank < profile.max_lora_rank:
        raise FailedPrecondition(
            "BELOW_PROFILE",
            f"--max-lora-rank is {max_lora_rank}; the store takes adapters of {profile.name} up to rank "
            f"{profile.max_lora_rank}: raise it",
            field="max_lora_rank",
        )
    else:
        return
    raise FailedPrecondition(
        "BASE_MODEL_MISMATCH",
        f"the model served as {profile.name} has {differs}; serve it under another name, or register its own profile",
        field="served_model_name",
    )


def _parse(config_json: str) -> dict[str, Any]:
    try:
        config = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(
            "INVALID_CONFIG", f"config_json is no JSON ({error}); send the model's config.json", field="config_json"
        ) from error
    if not isinstance(config, dict):
        raise InvalidArgument("INVALID_CONFIG", "config_json must be a JSON object", field="config_json")
    return config


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 24:
        raise InvalidArgument(
            "INVALID_CONFIG", f"config_json: {key} is {value!r}; a positive integer is needed", field="config_json"
        )
    return value
