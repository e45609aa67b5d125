"""The config's meaning, against PEFT itself."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.adapter_store import manifest_fields
from services.adapter_store.findings import Findings
from services.adapter_store.manifest import Manifest, parse_manifest
from services.adapter_store.patterns import MAX_PATTERNS_WITH_CHOICES, PatternError, Patterns
from tests.adapter_store.uploads import PEFT_CONFIG

MODULES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 10, 11)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.up_proj")
]


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that PEFT brings along
        return pytest.importorskip("peft")


def parsed(**fields: Any) -> Manifest:
    findings = Findings()
    manifest = parse_manifest(json.dumps(PEFT_CONFIG | fields).encode(), findings)
    assert manifest is not None
    findings.raise_if_any()
    return manifest


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2},
        {"self_attn.q_proj": 2, "q_proj": 3},
        {"q_proj": 3, "self_attn.q_proj": 2},
        {"proj": 2},
        {"_proj": 2},
        {"model.layers.1.mlp.down_proj": 2},
        {"layers.1.mlp.down_proj": 2, "down_proj": 5},
        {"^model.layers.1.mlp.down_proj": 2},
        {r"layers\.1\d\..*": 2},
        {r".*\.(q|k)_proj": 2},
        {"q_proj|up_proj": 2},
        {"layers.1": 2},
        {"": 2},
        {"q_proj$": 2},
        {"Q_proj": 2},
    ],
)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.usefixtures("peft")
def test_ranks_and_scales_are_pefts(pattern: dict[str, int], use_rslora: bool) -> None:
    from peft.utils.other import get_pattern_key

    alphas = {key: value * 2.5 for key, value in reversed(pattern.items())}
    manifest = parsed(r=4, lora_alpha=6, rank_pattern=pattern, alpha_pattern=alphas, use_rslora=use_rslora)
    for module in MODULES:
        rank = pattern.get(get_pattern_key(pattern.keys(), module), 4)
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), 6)
        assert manifest.rank_and_scale(module) == (rank, alpha / math.sqrt(rank) if use_rslora else alpha / rank)


def test_every_field_of_peft_is_decided_once(peft: Any) -> None:
    tables = [manifest_fields.READ, set(manifest_fields.HARMLESS), set(manifest_fields.REFUSED)]
    known = set().union(*tables)
    assert sum(map(len, tables)) == len(known)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == known


def test_what_peft_saves_is_accepted(peft: Any, tmp_path: Any) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="x")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved.keys() == PEFT_CONFIG.keys()
    findings = Findings()
    assert parse_manifest(json.dumps(saved).encode(), findings) is not None
    findings.raise_if_any()


@pytest.mark.parametrize(
    ("init", "changes_base"),
    [
        *((init, False) for init in (True, False, None, "gaussian", "eva", "orthogonal", "mica")),
        *((init, True) for init in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq")),
    ],
)
def test_initialisations(init: Any, changes_base: bool) -> None:
    assert parsed(init_lora_weights=init).changes_base is changes_base


@pytest.mark.parametrize(
    "pattern",
    [
        "([a-z.]+)+!",
        "(a|a)*!",
        "(?:[a-z_.0-9]*)*!",
        "(a{1,9}){1,9}!",
        r"(\w+)*\.x",
        "(?#[)([a-z.]+)+]",
        "(?x)a",
        "(?=a)b",
        ".*.*.*.*!",
        "(.|.)(.|.)(.|.)(.|.)",
        "(",
        "[",
        "a**",
        "(?P<x>a)",
        r"\9",
        "x" * 300,
        "a{99999999999999999999}",
    ],
)
def test_patterns_that_could_hang_or_fail_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        Patterns({pattern: 1})


def test_the_number_of_costly_patterns_is_bounded() -> None:
    Patterns({f"layers.{number}.q_proj": 1 for number in range(1000)})
    with pytest.raises(PatternError, match=str(MAX_PATTERNS_WITH_CHOICES)):
        Patterns({f".*{number}": 1 for number in range(MAX_PATTERNS_WITH_CHOICES + 1)})


@given(st.text(alphabet="ab.*+?{}()[]|\\^$:1,-", max_size=24))
def test_any_pattern_is_compiled_or_refused_and_matches_in_bounds(pattern: str) -> None:
    try:
        patterns = Patterns({pattern: 1})
    except PatternError:
        return
    # a pattern out of bounds would take hours, which the test's timeout ends
    assert patterns.lookup("a.b." * 15 + "!", 0) in (0, 1)


FIELDS = st.sampled_from([*PEFT_CONFIG, "new"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(FIELDS, VALUES, max_size=6))
def test_any_config_is_read_or_refused(fields: dict[str, Any]) -> None:
    findings = Findings()
    manifest = parse_manifest(json.dumps(PEFT_CONFIG | fields).encode(), findings)
    assert manifest is not None or len(findings) > 0
    if manifest is not None:
        rank, scale = manifest.rank_and_scale(MODULES[0])
        assert rank >= 1
        assert math.isfinite(scale)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    findings = Findings()
    assert parse_manifest(data, findings) is None
    assert len(findings) > 0
