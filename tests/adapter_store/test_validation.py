"""Every rule an adapter must pass, each broken in one way: the status, the reason, and the culprit by name."""

# ruff: noqa: E501 -- a table with one case a line
from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from services.common.errors import FailedPrecondition, InvalidArgument, MultiloraError, NotFound
from tests.adapter_store import uploads
from tests.adapter_store.conftest import RunningStore
from tests.adapter_store.uploads import Adapter, Tensor, key, make_adapter

Q, DOWN = "self_attn.q_proj", "mlp.down_proj"
Break = Callable[[Adapter], None]


def config(**fields: Any) -> Break:
    return lambda adapter: adapter.config.update(fields)


def without(field: str) -> Break:
    return lambda adapter: adapter.config.pop(field)


def raw_config(data: bytes) -> Break:
    def change(adapter: Adapter) -> None:
        adapter.raw_config = data

    return change


def raw_weights(data: bytes) -> Break:
    def change(adapter: Adapter) -> None:
        adapter.raw_weights = data

    return change


def value(layer: int, module: str, side: str, number: float) -> Break:
    def change(adapter: Adapter) -> None:
        tensor = adapter.tensors[key(layer, module, side)]
        values = np.frombuffer(tensor.data, "<f4").copy()
        values[len(values) // 2] = number
        tensor.data = values.tobytes()

    return change


def tensor(name: str, *shape: int, dtype: str = "F32") -> Break:
    def change(adapter: Adapter) -> None:
        adapter.tensors[name] = Tensor.of(np.ones(shape, np.float32), dtype)

    return change


def drop(name: str) -> Break:
    return lambda adapter: adapter.tensors.pop(name)


def zero(*sides: str) -> Break:
    def change(adapter: Adapter) -> None:
        for name, kept in adapter.tensors.items():
            if any(f"lora_{side}" in name for side in sides):
                kept.data = bytes(len(kept.data))

    return change


def as_dtype(dtype: str) -> Break:
    def change(adapter: Adapter) -> None:
        for name, kept in adapter.tensors.items():
            values = np.frombuffer(kept.data, "<f4").reshape(kept.shape)
            adapter.tensors[name] = Tensor.of(values, dtype)

    return change


def ia3(adapter: Adapter) -> None:
    adapter.config["peft_type"] = "IA3"
    adapter.tensors = {
        "base_model.model.model.layers.0.mlp.down_proj.ia3_l": Tensor.of(np.ones((1, uploads.INTERMEDIATE), np.float32))
    }


def smaller_sibling(adapter: Adapter) -> None:
    tensor(key(0, Q, "A"), 4, 8)(adapter)
    tensor(key(0, Q, "B"), 8, 4)(adapter)


def no_tensors(adapter: Adapter) -> None:
    adapter.tensors = {}


def duplicate_key(adapter: Adapter) -> None:
    tensor(key(0, Q, "A").replace(".weight", ".default.weight"), 4, 16)(adapter)


def high_rank(adapter: Adapter) -> None:
    adapter.config["r"] = 9
    uploads.add_module(adapter, 0, Q, rank=9)
    for name in (key(0, DOWN, "A"), key(0, DOWN, "B"), key(1, Q, "A"), key(1, Q, "B")):
        del adapter.tensors[name]
    uploads.add_module(adapter, 1, DOWN, rank=9)


A0, B0 = key(0, Q, "A"), key(0, Q, "B")
EMBED = "base_model.model.model.embed_tokens"
MALFORMED: list[tuple[str, Break, str, str]] = [
    ("config is no JSON", raw_config(b"{"), "INVALID_ADAPTER_CONFIG", "adapter_config.json"),
    ("config is empty", raw_config(b""), "INVALID_ADAPTER_CONFIG", "adapter_config.json"),
    ("config is no object", raw_config(b"[]"), "INVALID_ADAPTER_CONFIG", "JSON object"),
    ("config is not UTF-8", raw_config(b"\xff\xfe{}"), "INVALID_ADAPTER_CONFIG", "UTF-8"),
    ("config nests too deep", raw_config(b'{"a":' * 20000), "INVALID_ADAPTER_CONFIG", "adapter_config.json"),
    ("config has a key twice", raw_config(b'{"r": 4, "r": 8}'), "INVALID_ADAPTER_CONFIG", "'r' is in it twice"),
    ("no peft_type", without("peft_type"), "INVALID_ADAPTER_CONFIG", "peft_type"),
    ("r is 0", config(r=0), "INVALID_ADAPTER_CONFIG", "r is 0"),
    ("r is a fraction", config(r=4.5), "INVALID_ADAPTER_CONFIG", "r is 4.5"),
    ("r is a boolean", config(r=True), "INVALID_ADAPTER_CONFIG", "r is True"),
    ("r is text", config(r="4"), "INVALID_ADAPTER_CONFIG", "r is '4'"),
    ("alpha is NaN", config(lora_alpha=float("nan")), "INVALID_ADAPTER_CONFIG", "lora_alpha is nan"),
    ("alpha is infinite", config(lora_alpha=float("inf")), "INVALID_ADAPTER_CONFIG", "lora_alpha is inf"),
    ("alpha overflows float32", config(lora_alpha=1e39), "INVALID_ADAPTER_CONFIG", "lora_alpha"),
    ("alpha overflows float64", config(lora_alpha=10**400), "INVALID_ADAPTER_CONFIG", "lora_alpha"),
    ("alpha is null", config(lora_alpha=None), "INVALID_ADAPTER_CONFIG", "lora_alpha is None"),
    ("alpha in a pattern is NaN", config(alpha_pattern={"q": float("nan")}), "INVALID_ADAPTER_CONFIG", "['q']"),
    ("rank in a pattern is 0", config(rank_pattern={"q_proj": 0}), "INVALID_ADAPTER_CONFIG", "rank_pattern['q_proj']"),
    ("rank_pattern is a list", config(rank_pattern=[1]), "INVALID_ADAPTER_CONFIG", "rank_pattern"),
    ("a pattern is no expression", config(rank_pattern={"(": 4}), "INVALID_ADAPTER_CONFIG", "'('"),
    ("a pattern could take hours", config(alpha_pattern={"([a-z]+)+!": 4}), "INVALID_ADAPTER_CONFIG", "too long"),
    ("use_rslora is text", config(use_rslora="yes"), "INVALID_ADAPTER_CONFIG", "use_rslora"),
    ("base model is a number", config(base_model_name_or_path=3), "INVALID_ADAPTER_CONFIG", "base_model_name_or_path"),
    ("weights are empty", raw_weights(b""), "INVALID_SAFETENSORS", "adapter_model.safetensors"),
    ("weights are cut off", raw_weights(uploads.safetensors_bytes(make_adapter().tensors)[:-1]), "INVALID_SAFETENSORS", "bytes"),
    ("weights have bytes to spare", raw_weights(uploads.safetensors_bytes(make_adapter().tensors) + b"\0"), "INVALID_SAFETENSORS", "bytes"),
    ("header is longer than the file", raw_weights(b"\xff\xff\0\0\0\0\0\0{}"), "INVALID_SAFETENSORS", "65535"),
    ("header is giant", raw_weights(b"\xff" * 8 + b"{}"), "INVALID_SAFETENSORS", "18446744073709551615"),
    ("weights are a pickle", raw_weights(pickle.dumps({"weights": [1.0] * 9}, protocol=2)), "UNSAFE_FORMAT", "pickle"),
    ("weights are a torch archive", raw_weights(b"PK\x03\x04" + bytes(range(1, 60))), "UNSAFE_FORMAT", "pickle"),
    ("A without B", drop(B0), "UNPAIRED_TENSOR", "model.layers.0.self_attn.q_proj has lora_A but no lora_B"),
    ("B without A", drop(A0), "UNPAIRED_TENSOR", "model.layers.0.self_attn.q_proj has lora_B but no lora_A"),
    ("A twice", duplicate_key, "DUPLICATE_TENSOR", "lora_A of model.layers.0.self_attn.q_proj"),
    ("rank other than in the config", config(r=8), "RANK_MISMATCH", "config says rank 8, lora_A has 4"),
    ("rank by pattern other than in the tensors", config(rank_pattern={"layers.1.mlp.down_proj": 2}), "RANK_MISMATCH", "model.layers.1.mlp.down_proj: the config says rank 2"),
    ("ranks of A and B differ", tensor(B0, 16, 3), "RANK_MISMATCH", "lora_A has 4 and lora_B 3"),
    ("rank 0 in the tensors", tensor(A0, 0, 16), "RANK_MISMATCH", "lora_A has 0"),
    ("A and B in different dtypes", tensor(B0, 16, 4, dtype="F16"), "DTYPE_MISMATCH", "lora_A is F32, lora_B F16"),
    ("a NaN in A", value(0, Q, "A", float("nan")), "NON_FINITE_WEIGHTS", A0),
    ("an inf in B", value(1, DOWN, "B", float("-inf")), "NON_FINITE_WEIGHTS", key(1, DOWN, "B")),
]  # fmt: skip
MISFITS: list[tuple[str, Break, str, str]] = [
    ("IA3", ia3, "UNSUPPORTED_FEATURE", "IA3"),
    ("DoRA", config(use_dora=True), "UNSUPPORTED_FEATURE", "use_dora"),
    ("modules_to_save", config(modules_to_save=["lm_head"]), "UNSUPPORTED_FEATURE", "modules_to_save"),
    ("bias", config(bias="lora_only"), "UNSUPPORTED_FEATURE", "bias"),
    ("lora_bias", config(lora_bias=True), "UNSUPPORTED_FEATURE", "lora_bias"),
    ("trainable tokens", config(trainable_token_indices=[0]), "UNSUPPORTED_FEATURE", "trainable_token_indices"),
    ("target_parameters", config(target_parameters=["w"]), "UNSUPPORTED_FEATURE", "target_parameters"),
    ("layer_replication", config(layer_replication=[[0, 2]]), "UNSUPPORTED_FEATURE", "layer_replication"),
    ("activated LoRA", config(alora_invocation_tokens=[1, 2]), "UNSUPPORTED_FEATURE", "alora_invocation_tokens"),
    ("QALoRA", config(use_qalora=True), "UNSUPPORTED_FEATURE", "use_qalora"),
    ("KaSA", config(kasa_config={"beta": 1}), "UNSUPPORTED_FEATURE", "kasa_config"),
    ("BD-LoRA", config(use_bdlora={"nblocks": 2}), "UNSUPPORTED_FEATURE", "use_bdlora"),
    ("a field nobody knows", config(use_next_years_lora=1), "UNSUPPORTED_FEATURE", "use_next_years_lora"),
    ("an index of 0 nobody knows", config(new_index=0), "UNSUPPORTED_FEATURE", "new_index"),
    ("an unknown initialisation", config(init_lora_weights="novel"), "UNSUPPORTED_FEATURE", "'novel'"),
    ("PiSSA not converted", config(init_lora_weights="pissa_niter_4"), "CHANGED_BASE_WEIGHTS", "init_lora_weights"),
    ("OLoRA not converted", config(init_lora_weights="olora"), "CHANGED_BASE_WEIGHTS", "init_lora_weights"),
    ("LoftQ", config(init_lora_weights="loftq"), "CHANGED_BASE_WEIGHTS", "init_lora_weights"),
    ("LoRA-GA not converted", config(init_lora_weights="lora_ga"), "CHANGED_BASE_WEIGHTS", "init_lora_weights"),
    ("CorDA not converted", config(init_lora_weights="corda"), "CHANGED_BASE_WEIGHTS", "init_lora_weights"),
    ("another base model", config(base_model_name_or_path="org/Other"), "BASE_MODEL_MISMATCH", "'org/Other'"),
    ("no base model", config(base_model_name_or_path=None), "BASE_MODEL_MISMATCH", "base_model_name_or_path is None"),
    ("a smaller sibling", smaller_sibling, "SHAPE_MISMATCH", f"'{A0}' has shape [4, 8]; tiny-llama needs [r, 16]"),
    ("A has three dimensions", tensor(A0, 4, 16, 1), "SHAPE_MISMATCH", "[4, 16, 1]"),
    ("B is transposed", tensor(key(0, DOWN, "B"), 4, 16), "SHAPE_MISMATCH", key(0, DOWN, "B")),
    ("a layer out of range", tensor(key(2, Q, "A"), 4, 16), "LAYER_OUT_OF_RANGE", "layer 2; tiny-llama has layers 0 to 1"),
    ("an unknown module", tensor(key(0, "self_attn.qkv_proj", "A"), 4, 16), "UNKNOWN_MODULE", "self_attn.qkv_proj"),
    ("a name that only ends like one", tensor("base_model.model.x." + key(0, Q, "A")[17:], 4, 16), "UNKNOWN_MODULE", "x.model.layers.0"),
    ("a tensor that is no LoRA", tensor("base_model.model.model.norm.weight", 16), "UNKNOWN_MODULE", "model.norm.weight"),
    ("a layer with a leading zero", tensor(key(0, Q, "A").replace("s.0.", "s.00."), 4, 16), "UNKNOWN_MODULE", "layers.00"),
    ("a copy of base weights elsewhere", tensor(f"base_model.model.model.layers.0.{Q}.base_layer.weight", 16, 16), "UNKNOWN_MODULE", "base_layer.weight"),
    ("LoRA on embeddings", tensor(f"{EMBED}.lora_embedding_A", 4, 32), "UNSUPPORTED_FEATURE", "lora_embedding_A"),
    ("LoRA on lm_head", tensor("base_model.model.lm_head.lora_A.weight", 4, 16), "UNSUPPORTED_FEATURE", "lm_head"),
    ("trained embeddings", tensor(f"{EMBED}.weight", 33, 16), "UNSUPPORTED_FEATURE", "embed_tokens"),
    ("extra vocabulary", tensor(f"{EMBED}.base_layer.weight", 33, 16), "EXTRA_VOCABULARY", "has 32 rows"),
    ("a DoRA magnitude", tensor(f"base_model.model.model.layers.0.{Q}.lora_magnitude_vector", 16), "UNSUPPORTED_FEATURE", "lora_magnitude_vector"),
    ("a bias in B", tensor(B0.replace("weight", "bias"), 16), "UNSUPPORTED_FEATURE", "lora_B.bias"),
    ("a saved module", tensor("base_model.model.lm_head.modules_to_save.weight", 32, 16), "UNSUPPORTED_FEATURE", "modules_to_save"),
    ("int8 tensors", as_dtype("I8"), "UNSUPPORTED_DTYPE", "I8"),
    ("float64 tensors", as_dtype("F64"), "UNSUPPORTED_DTYPE", "F64"),
    ("a rank above the fleet's", high_rank, "ADAPTER_RANK_TOO_HIGH", "rank 9; tiny-llama serves at most 8"),
    ("no tensors at all", no_tensors, "NO_MODULES", "tiny-llama"),
    ("B all zero", zero("B"), "ZERO_ADAPTER", "lora_B"),
    ("A all zero", zero("A"), "ZERO_ADAPTER", "lora_A"),
    ("alpha is 0", config(lora_alpha=0), "ZERO_ADAPTER", "lora_alpha"),
]  # fmt: skip


def refusal(shared: RunningStore, adapter: Adapter, **fields: Any) -> MultiloraError:
    """The error of an upload that must leave nothing behind."""
    before = shared.blob_files()
    with pytest.raises(MultiloraError) as caught:
        shared.client.register("refused", adapter, **fields)
    assert shared.blob_files() == before
    with pytest.raises(NotFound, match="ADAPTER_NOT_FOUND"):
        shared.client("GetAdapter", adapter="refused")
    return caught.value


@pytest.mark.parametrize(
    ("change", "reason", "culprit"), [case[1:] for case in MALFORMED], ids=[c[0] for c in MALFORMED]
)
def test_malformed_uploads_are_invalid(shared: RunningStore, change: Break, reason: str, culprit: str) -> None:
    adapter = make_adapter()
    change(adapter)
    error = refusal(shared, adapter)
    assert (type(error), error.reason) == (InvalidArgument, reason), error.message
    assert culprit in error.message


@pytest.mark.parametrize(("change", "reason", "culprit"), [case[1:] for case in MISFITS], ids=[c[0] for c in MISFITS])
def test_misfits_are_refused(shared: RunningStore, change: Break, reason: str, culprit: str) -> None:
    adapter = make_adapter()
    change(adapter)
    error = refusal(shared, adapter)
    # a tensor added alone is unpaired, too, so only the reasons are compared
    assert reason in error.metadata["reasons"].split(","), error.message
    assert culprit in error.message
    if error.metadata["reasons"] == reason:
        assert type(error) is FailedPrecondition


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_half_precision_is_checked_too(shared: RunningStore, dtype: str, number: float) -> None:
    adapter = make_adapter(dtype=dtype)
    values = np.ones((4, 16), np.float32)
    values[2, 3] = number
    adapter.tensors[A0] = Tensor.of(values, dtype)
    assert refusal(shared, adapter).reason == "NON_FINITE_WEIGHTS"


def test_rank_too_high_tells_both_numbers(shared: RunningStore) -> None:
    error = refusal(shared, make_adapter(rank=9))
    assert (error.reason, error.metadata["rank"], error.metadata["max_lora_rank"]) == (
        "ADAPTER_RANK_TOO_HIGH",
        "9",
        "8",
    )


def test_all_findings_come_at_once(shared: RunningStore) -> None:
    adapter = make_adapter(use_dora=True, base_model_name_or_path="org/Other")
    value(0, Q, "A", float("nan"))(adapter)
    drop(key(1, DOWN, "B"))(adapter)
    tensor(key(7, Q, "A"), 4, 16)(adapter)
    error = refusal(shared, adapter)
    reasons = [
        "UNSUPPORTED_FEATURE",
        "BASE_MODEL_MISMATCH",
        "LAYER_OUT_OF_RANGE",
        "UNPAIRED_TENSOR",
        "NON_FINITE_WEIGHTS",
    ]
    assert type(error) is InvalidArgument
    assert error.reason == reasons[0]
    assert error.metadata["reasons"].split(",") == reasons
    assert error.metadata["finding_count"] == "5"
    assert all(reason in error.message for reason in reasons)


def test_a_bad_config_hides_nothing_of_the_weights(shared: RunningStore) -> None:
    adapter = make_adapter(lora_alpha="high")
    zero("B")(adapter)
    tensor(B0, 16, 3)(adapter)
    adapter.tensors[B0].data = bytes(16 * 3 * 4)
    error = refusal(shared, adapter)
    assert error.metadata["reasons"] == "INVALID_ADAPTER_CONFIG,RANK_MISMATCH,ZERO_ADAPTER"
    assert "model.layers.0.self_attn.q_proj: lora_A has 4 and lora_B 3" in error.message


def test_a_thousand_findings_still_arrive(shared: RunningStore) -> None:
    adapter = make_adapter(use_dora=True)
    for index in range(1000):
        tensor(f"base_model.model.ü{index}.lora_A.weight", 1)(adapter)
    error = refusal(shared, adapter)
    assert error.metadata["finding_count"] == "1001"
    assert error.message.endswith("more")


def test_a_giant_tensor_name_still_arrives(shared: RunningStore) -> None:
    adapter = make_adapter()
    tensor("x" * 100_000, 1)(adapter)
    assert "(100002 characters)" in refusal(shared, adapter).message


def test_overrides_accept_what_they_name(client: Any) -> None:
    accepted = [
        ("forced", make_adapter(base_model_name_or_path="org/Other"), {"force_base": True}),
        ("pissa", make_adapter(init_lora_weights="pissa"), {"allow_changed_base": True}),
    ]
    zeroed = make_adapter()
    zero("B")(zeroed)
    for name, adapter, override in [*accepted, ("zero", zeroed, {"allow_zero": True})]:
        assert client.register(name, adapter, **override).version.identity.version == 1


def test_harmless_variations_are_accepted(client: Any) -> None:
    variations: dict[str, dict[str, Any]] = {
        "an accepted name": {"base_model_name_or_path": "org/Tiny-Llama"},
        "all-linear": {"target_modules": "all-linear"},
        "a regular expression": {"target_modules": r".*\.(q|v)_proj"},
        "some layers": {"layers_to_transform": [0], "layers_pattern": "layers"},
        "fan_in_fan_out": {"fan_in_fan_out": True},
        "dropout": {"lora_dropout": 0.5},
        "gaussian": {"init_lora_weights": "gaussian"},
        "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        "no initialisation": {"init_lora_weights": False},
        "an unknown field that says nothing": {"use_next_years_lora": False, "next": None},
        "metadata": {"revision": "abc", "task_type": None, "auto_mapping": {"parent_library": "x"}},
    }
    for number, fields in enumerate(variations.values()):
        assert client.register(f"variation-{number}", make_adapter(**fields)).version.identity.version == 1
    old = make_adapter()
    old.config = {"peft_type": "LORA", "base_model_name_or_path": "tiny-llama", "r": 4}
    answer = client.register("old", old)
    assert {module.scale for module in answer.version.modules} == {2.0}  # PEFT's default α of 8


def test_copies_of_embeddings_are_skipped(client: Any) -> None:
    adapter = make_adapter()
    tensor(f"{EMBED}.base_layer.weight", 32, 16)(adapter)
    tensor("base_model.model.lm_head.base_layer.weight", 32, 16)(adapter)
    assert len(client.register("copies", adapter).version.modules) == 4


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight",
        "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_{}.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight",
        "model.layers.0.self_attn.q_proj.lora_{}.weight",
    ],
)
def test_prefixes_are_normalised(client: Any, name: str) -> None:
    adapter = make_adapter(modules=(Q,), layers=(0,))
    adapter.tensors = {name.format(side): adapter.tensors[key(0, Q, side)] for side in "AB"}
    (module,) = client.register("prefixed", adapter).version.modules
    assert module.name == "model.layers.0.self_attn.q_proj"


def test_high_rank_and_negative_alpha_are_warned_of(client: Any) -> None:
    client.register_base_model("wide", max_lora_rank=512)
    adapter = make_adapter(rank=256, base_model_name_or_path="wide", lora_alpha=-8)
    warnings = client.register("heavy", adapter, base_model="wide").warnings
    assert "rank 256" in warnings[0]
    assert "negative" in warnings[1]
    assert list(client.register("heavy", adapter, base_model="wide").warnings) == list(warnings)


def test_answer_lists_ranks_and_scales(client: Any) -> None:
    adapter = make_adapter(
        rank=4,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={"down_proj": 1},
        alpha_pattern={r"layers\.1\.mlp\.down_proj": 3},
    )
    for layer in (0, 1):
        uploads.add_module(adapter, layer, DOWN, rank=1)
    version = client.register("ranks", adapter).version
    assert [(module.name[13:], module.rank, module.scale) for module in version.modules] == [
        ("0.self_attn.q_proj", 4, 8.0),
        ("0.mlp.down_proj", 1, 16.0),
        ("1.self_attn.q_proj", 4, 8.0),
        ("1.mlp.down_proj", 1, 3.0),
    ]
    assert (version.max_rank, version.dtype) == (4, "float32")
    assert version.parameters == 2 * (4 * 32 + 1 * 40)
    assert json.dumps(adapter.config)  # the config is what PEFT would save
