"""A packed adapter in host memory: checked once as it arrives, then only sliced."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.common.errors import DataLoss, FailedPrecondition
from services.common.packed import PackedHeader, PackedModule, decode_header
from services.common.profile import Shape
from services.inference.model.lora import LINEAR_GROUPS

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LINEARS = frozenset(linear for group in LINEAR_GROUPS.values() for linear in group)


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """One linear's weights as they came: a [rank, in], b [rank, out]; `scale` multiplies the shrink result."""

    rank: int
    scale: float
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class BaseModelShapes:
    """What an adapter must fit: full names and shapes of the linears, the highest rank, and the pool's dtype.

    pinned: whether its bytes go to pinned memory, from which a GPU copies while steps run
    """

    modules: Mapping[str, Shape]
    max_lora_rank: int
    dtype: torch.dtype
    pinned: bool = False


class PackedAdapter:
    """The bytes of one version.

    digest: content digest; ranks: highest rank of each linear (`self_attn.q_proj`, …) over the layers
    """

    def __init__(self, data: bytearray, digest: str, base: BaseModelShapes) -> None:
        """Check everything that the store checked too, since disks and wires lie.

        Raises DataLoss (damaged bytes, another content) and FailedPrecondition (does not fit this model).
        """
        header, payload = decode_header(memoryview(data), len(data))
        if header.content_digest != digest:
            raise DataLoss("DIGEST_MISMATCH", f"the store sent {header.content_digest} where {digest} was asked for")
        self.digest = digest
        self.num_bytes = len(data)
        self._base = base
        self._file = torch.frombuffer(data, dtype=torch.uint8)
        if base.pinned:
            self._file = self._file.pin_memory()
        self._bytes = self._file[payload:]
        self._check_checksums(header, memoryview(data)[payload:])
        self._runs = {layer.index: self._bytes[layer.offset : layer.offset + layer.size] for layer in header.layers}
        self._modules: dict[tuple[int, str], ModuleTensors] = {}
        self.ranks: dict[str, int] = {}
        for module in header.modules:
            self._add(module, base)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as the bytes it came in: its tensors all share them, and a pickle would copy them for each."""
        return PackedAdapter, (bytearray(self._file.numpy()), self.digest, self._base)

    @property
    def max_rank(self) -> int:
        return max(self.ranks.values())

    def module(self, layer: int, linear: str) -> ModuleTensors | None:
        """The weights for one linear of one layer; None where the adapter leaves the base as it is."""
        return self._modules.get((layer, linear))

    def run(self, layer: int) -> Tensor | None:
        """The bytes in which the tensors of the layer's modules lie; None where it has none."""
        return self._runs.get(layer)

    def _check_checksums(self, header: PackedHeader, payload: memoryview) -> None:
        for layer in header.layers:
            if f"{zlib.crc32(payload[layer.offset : layer.offset + layer.size]):08x}" != layer.crc32:
                raise DataLoss("PACKED_CORRUPT", f"layer {layer.index} of the packed adapter is damaged; pull it again")

    def _add(self, module: PackedModule, base: BaseModelShapes) -> None:
        prefix = f"model.layers.{module.layer}."
        linear = module.name.removeprefix(prefix)
        shape = base.modules.get(module.name)
        if shape is None or linear not in _LINEARS or not module.name.startswith(prefix):
            raise FailedPrecondition("UNKNOWN_MODULE", f"the adapter changes {module.name}, which this model lacks")
        if (module.in_features, module.out_features) != (shape.in_features, shape.out_features):
            raise FailedPrecondition(
                "SHAPE_MISMATCH",
                f"{module.name} is {module.in_features} → {module.out_features} in the adapter and "
                f"{shape.in_features} → {shape.out_features} in the model; it was trained on another base",
            )
        if module.rank > base.max_lora_rank:
            raise FailedPrecondition(
                "ADAPTER_RANK_TOO_HIGH",
                f"{module.name} has rank {module.rank}, this replica holds {base.max_lora_rank}; raise --max-lora-rank",
                rank=module.rank,
                max_lora_rank=base.max_lora_rank,
            )
        tensors = ModuleTensors(
            module.rank,
            module.scale,
            self._view(module, module.a_offset, module.a_bytes),
            self._view(module, module.b_offset, module.b_bytes),
        )
        for weights in (tensors.a, tensors.b):
            if not _is_finite(weights.to(base.dtype)):
                raise FailedPrecondition(
                    "NON_FINITE_WEIGHTS", f"{module.name} holds values that are not finite in {base.dtype}"
                )
        self._modules[module.layer, linear] = tensors
        self.ranks[linear] = max(self.ranks.get(linear, 0), module.rank)

    def _view(self, module: PackedModule, offset: int, size: int) -> Tensor:
        return self._bytes[offset : offset + size].view(_DTYPES[module.dtype]).view(module.rank, -1)


def _is_finite(weights: Tensor) -> bool:
    """In one pass: a NaN is both the least and the largest, infinities are one of them."""
    return all(math.isfinite(extreme.item()) for extreme in weights.aminmax())
