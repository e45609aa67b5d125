"""Profiles derived from a model's config.json."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument, MultiloraError, Unimplemented
from services.common.profile import BaseModelProfile, Shape, profile_from_config

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "vocab_size": 100,
}


def profile(config: dict[str, Any] | None = None, **fields: Any) -> BaseModelProfile:
    return profile_from_config("tiny", json.dumps(CONFIG | (config or {})), **fields)


def test_shapes_follow_the_config() -> None:
    modules = profile().modules
    assert len(modules) == 12 * 7
    assert modules["model.layers.3.self_attn.q_proj"] == Shape(64, 64)
    assert modules["model.layers.3.self_attn.k_proj"] == Shape(64, 32)
    assert modules["model.layers.3.mlp.down_proj"] == Shape(96, 64)
    wide = profile({"head_dim": 32, "num_key_value_heads": None}).modules
    assert wide["model.layers.0.self_attn.q_proj"] == wide["model.layers.0.self_attn.v_proj"] == Shape(64, 128)
    assert wide["model.layers.0.self_attn.o_proj"] == Shape(128, 64)


def test_json_keeps_layers_in_order() -> None:
    """Sorted by name, layer 10 would come before layer 2."""
    made = profile(accepted_names=["tiny", "org/Tiny"])
    read = BaseModelProfile.from_json(made.to_json())
    assert read == made
    assert list(read.modules) == list(made.modules)
    assert made.accepted_names == ("tiny", "org/Tiny")


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        ({"hidden_size": 0}, InvalidArgument, "hidden_size"),
        ({"hidden_size": None}, InvalidArgument, "hidden_size"),
        ({"vocab_size": True}, InvalidArgument, "vocab_size"),
        ({"num_hidden_layers": 1 << 30}, InvalidArgument, "num_hidden_layers"),
        ({"architectures": ["GPT2LMHeadModel"]}, Unimplemented, "GPT2LMHeadModel"),
        ({"architectures": []}, Unimplemented, "architecture"),
    ],
)
def test_senseless_configs_are_refused(change: dict[str, Any], kind: type[MultiloraError], told: str) -> None:
    with pytest.raises(kind, match=told):
        profile(change)


@pytest.mark.parametrize("rank", [0, 513])
def test_ranks_are_bounded(rank: int) -> None:
    with pytest.raises(InvalidArgument, match="max_lora_rank"):
        profile(max_lora_rank=rank)


def test_extra_vocabulary_is_not_served_yet() -> None:
    with pytest.raises(Unimplemented, match="lora_extra_vocab_size"):
        profile(lora_extra_vocab_size=1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 300) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*CONFIG, "head_dim"]), VALUES, max_size=3))
def test_any_config_is_read_or_refused(change: dict[str, Any]) -> None:
    try:
        made = profile(change)
    except MultiloraError:
        return
    assert all(shape.in_features > 0 and shape.out_features > 0 for shape in made.modules.values())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        profile_from_config("tiny", text)
