"""Packed adapters of a very small base model, made by the store's own validation and packing."""

from __future__ import annotations

import hashlib
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels import PAGE_ROWS
from services.adapter_store.packing import into, pack
from services.adapter_store.records import Overrides
from services.adapter_store.validation import validate
from services.common.packed import decode_header, encode_header
from services.common.profile import BaseModelProfile, linear_shapes
from services.inference.adapters.copies import Lanes
from services.inference.adapters.packed_adapter import BaseModelShapes, PackedAdapter
from services.inference.adapters.slot_pool import SlotPool
from services.inference.engine.request import AdapterVersion
from services.inference.model.lora import LINEAR_GROUPS, GroupShape
from tests.assets.random_adapter import make_random_adapter

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}
LAYERS = 2
MAX_RANK = 40
ALL = r".*_proj"


def base_shapes(*, max_lora_rank: int = MAX_RANK, dtype: torch.dtype = torch.float32) -> BaseModelShapes:
    return BaseModelShapes(linear_shapes(CONFIG), max_lora_rank, dtype)


def make_pool(
    *,
    max_loras: int = 3,
    dtype: torch.dtype = torch.float32,
    max_resident: int = 0,
    lanes: Lanes | None = None,
    rank: int = 0,
    parts: int = 1,
) -> SlotPool:
    """parts: ranks that share an adapter, each with a part of every input and output"""
    shapes = linear_shapes(CONFIG)
    whole, part = {}, {}
    for group, linears in LINEAR_GROUPS.items():
        of_group = [shapes[f"model.layers.0.{linear}"] for linear in linears]
        width, outs = of_group[0].in_features, [shape.out_features for shape in of_group]
        whole[group] = GroupShape(width, tuple(outs))
        part[group] = GroupShape(width // parts, tuple(out // parts for out in outs))
    return SlotPool(part, LAYERS, max_loras, MAX_RANK, dtype, max_resident, rank, lanes=lanes, whole=whole)


@dataclass(frozen=True)
class Pack:
    """An adapter's packed bytes and the version they are of."""

    version: AdapterVersion
    data: bytes

    def adapter(self, base: BaseModelShapes | None = None) -> PackedAdapter:
        return PackedAdapter(bytearray(self.data), self.version.digest, base or base_shapes())


def make_pack(directory: Path, name: str, *, config: dict[str, Any] = CONFIG, **adapter: Any) -> Pack:
    """A random adapter, checked against `config`'s profile and packed."""
    made = make_random_adapter(directory / name, config, base_model_name_or_path="small", **adapter)
    shapes = linear_shapes(config)
    profile = BaseModelProfile(
        "small", "LlamaForCausalLM", config["num_hidden_layers"], config["vocab_size"], dict(shapes), ("small",), 512
    )
    with (made / "adapter_model.safetensors").open("rb") as file:
        weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    checked = validate(
        (made / "adapter_config.json").read_bytes(), memoryview(weights), profile, Overrides(allow_zero=True)
    )
    digest = digest_of(name.encode())
    out = bytearray()
    pack(
        checked.modules,
        memoryview(weights),
        content_digest=digest,
        base_model="small",
        write_at=into(out),
    )
    return as_pack(name, bytes(out))


def as_pack(name: str, data: bytes) -> Pack:
    return Pack(AdapterVersion(f"default/{name}", 1, digest_of(name.encode()), digest_of(data), len(data)), data)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def with_payload(pack_: Pack, offset: int, replacement: bytes) -> Pack:
    """Other bytes at an offset of the payload, under checksums that agree with them."""
    header, start = decode_header(pack_.data, len(pack_.data))
    payload = bytearray(pack_.data[start:])
    payload[offset : offset + len(replacement)] = replacement
    layers = tuple(
        replace(layer, crc32=f"{zlib.crc32(payload[layer.offset : layer.offset + layer.size]):08x}")
        for layer in header.layers
    )
    return as_pack(pack_.version.name.removeprefix("default/"), encode_header(replace(header, layers=layers)) + payload)


def poison(pool: SlotPool) -> None:
    """NaN wherever the pool holds weights, as the worst of former tenants would leave it."""
    for groups in pool.weights:
        for weights in groups.values():
            weights.a.fill_(torch.nan)
            for b in weights.b:
                b.fill_(torch.nan)


def lying(pool: SlotPool) -> Iterator[tuple[str, int, str, int, Tensor, Tensor, int, float]]:
    """What the page tables say lies in the pool: (digest, layer, linear, pages, a rows, b rows, rank, scale)."""
    for slot in pool.slots():
        for layer, groups in enumerate(pool.weights):
            for group, weights in groups.items():
                for index, linear in enumerate(LINEAR_GROUPS[group]):
                    pages = slot.pages.get(linear, ())
                    table = pool.tables[group].table[index, slot.index, : len(pages)].long()
                    rows = (table[:, None] * PAGE_ROWS + torch.arange(PAGE_ROWS)).flatten()
                    yield (
                        slot.digest,
                        layer,
                        linear,
                        len(pages),
                        weights.a[index, rows],
                        weights.b[index][rows],
                        int(weights.ranks[index, slot.index]),
                        float(weights.scales[index, slot.index]),
                    )
