"""What a replica checks of the bytes it is sent, before any of them can reach a slot."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from services.common.errors import DataLoss, FailedPrecondition
from services.common.packed import decode_header
from services.inference.adapters.packed_adapter import PackedAdapter
from tests.inference.adapters.packs import CONFIG, Pack, base_shapes, digest_of, make_pack, with_payload


@pytest.mark.parametrize("name", ["rank-1", "rank-40", "one-layer", "patterns", "half", "brain"])
def test_the_weights_are_those_of_the_upload(packs: dict[str, Pack], name: str, tmp_path: Path) -> None:
    from tests.inference.adapters.conftest import SHAPES

    made = make_pack(tmp_path, name, seed=list(SHAPES).index(name), **SHAPES[name])
    assert made.data == packs[name].data
    adapter = made.adapter()
    uploaded = load_file(tmp_path / name / "adapter_model.safetensors")
    found = 0
    for layer in range(CONFIG["num_hidden_layers"]):
        for linear in adapter.ranks:
            if (module := adapter.module(layer, linear)) is None:
                continue
            prefix = f"base_model.model.model.layers.{layer}.{linear}"
            assert torch.equal(module.a, uploaded[f"{prefix}.lora_A.weight"])
            assert torch.equal(module.b, uploaded[f"{prefix}.lora_B.weight"].T)
            assert module.rank == module.a.shape[0]
            found += 2
    assert found == len(uploaded)
    assert adapter.max_rank == max(weights.shape[0] for key, weights in uploaded.items() if "lora_A" in key)
    assert adapter.num_bytes == len(made.data)


def refused(pack: Pack, kind: type[Exception], **base: object) -> DataLoss | FailedPrecondition:
    with pytest.raises(kind) as caught:
        pack.adapter(base_shapes(**base))  # type: ignore[arg-type]
    assert isinstance(caught.value, DataLoss | FailedPrecondition)
    return caught.value


def test_another_versions_bytes(packs: dict[str, Pack]) -> None:
    with pytest.raises(DataLoss) as caught:
        PackedAdapter(bytearray(packs["half"].data), packs["brain"].version.digest, base_shapes())
    assert caught.value.reason == "DIGEST_MISMATCH"


def test_a_damaged_layer_is_named(packs: dict[str, Pack]) -> None:
    data = bytearray(packs["rank-16"].data)
    header, payload = decode_header(data, len(data))
    data[payload + header.layers[1].offset + 100] ^= 1
    error = refused(replace(packs["rank-16"], data=bytes(data)), DataLoss)
    assert error.reason == "PACKED_CORRUPT"
    assert "layer 1" in error.message


@given(cut=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_short_file_is_data_loss(packs: dict[str, Pack], cut: int) -> None:
    pack = packs["rank-1"]
    short = pack.data[: min(cut, len(pack.data) - 1)]
    assert refused(replace(pack, data=short), DataLoss).reason == "PACKED_CORRUPT"


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_is_found_or_is_no_part_of_it(packs: dict[str, Pack], data: st.DataObject) -> None:
    """Only padding between header and runs is nobody's: there the adapter still reads the same."""
    pack = packs["rank-1"]
    damaged = bytearray(pack.data)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    whole = pack.adapter()
    try:
        adapter = PackedAdapter(damaged, pack.version.digest, base_shapes())
    except (DataLoss, FailedPrecondition):
        return
    assert adapter.ranks.keys() == whole.ranks.keys()
    for layer in range(2):
        ours, theirs = adapter.module(layer, "self_attn.q_proj"), whole.module(layer, "self_attn.q_proj")
        assert ours is not None and theirs is not None
        assert torch.equal(ours.a, theirs.a) and torch.equal(ours.b, theirs.b)


def test_a_module_that_the_model_lacks(tmp_path: Path) -> None:
    deeper = make_pack(tmp_path, "deeper", config=CONFIG | {"num_hidden_layers": 3})
    error = refused(deeper, FailedPrecondition)
    assert error.reason == "UNKNOWN_MODULE"
    assert "model.layers.2.self_attn.q_proj" in error.message


def test_a_module_of_another_shape(tmp_path: Path) -> None:
    wider = make_pack(tmp_path, "wider", config=CONFIG | {"intermediate_size": 64}, target_modules=["up_proj"])
    error = refused(wider, FailedPrecondition)
    assert error.reason == "SHAPE_MISMATCH"
    assert all(number in error.message for number in ("up_proj", "64", "48"))


def test_a_rank_beyond_the_replicas(packs: dict[str, Pack]) -> None:
    error = refused(packs["rank-17"], FailedPrecondition, max_lora_rank=16)
    assert error.reason == "ADAPTER_RANK_TOO_HIGH"
    assert error.metadata == {"rank": "17", "max_lora_rank": "16"}
    assert packs["rank-17"].adapter(base_shapes(max_lora_rank=17)).max_rank == 17


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["a", "b"])
def test_weights_that_are_not_finite(packs: dict[str, Pack], value: float, side: str) -> None:
    header, _ = decode_header(packs["rank-16"].data, len(packs["rank-16"].data))
    module = header.modules[-1]
    offset = module.b_offset + module.b_bytes - 4 if side == "b" else module.a_offset
    error = refused(with_payload(packs["rank-16"], offset, struct.pack("<f", value)), FailedPrecondition)
    assert error.reason == "NON_FINITE_WEIGHTS"
    assert module.name in error.message


def test_weights_that_overflow_in_the_pools_dtype(packs: dict[str, Pack]) -> None:
    huge = with_payload(packs["rank-16"], 0, struct.pack("<f", 3.4e38))
    huge.adapter(base_shapes(dtype=torch.float32))
    error = refused(huge, FailedPrecondition, dtype=torch.bfloat16)
    assert error.reason == "NON_FINITE_WEIGHTS"
    assert "bfloat16" in error.message


def test_digests_are_of_the_bytes(packs: dict[str, Pack]) -> None:
    assert all(pack.version.pack_digest == digest_of(pack.data) for pack in packs.values())
