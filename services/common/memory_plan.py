"""What a replica's memory goes to, from a model's config and the room asked for: known before a weight is read.

- weights: every tensor of the decoder, and its rotary tables
- slot pool: max_loras × max_lora_rank, in rank pages, per layer and linear by its exact shape
- staging: where a GPU's adapters are copied to, a layer at a time, on their way to the pool
- activations: what the widest step holds at once, computed here, measured by a device that can
- CUDA graphs: what those of decode keep, likewise; a CPU has none
- KV cache: the rest of what the device may give; on a CPU what the flags say

Of a model that is cut among ranks these are one rank's; `services/inference/parallel/shard.py` says how it is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from services.common.errors import FailedPrecondition
from services.common.packed import ITEM_SIZES, largest_run
from services.common.profile import check_parts, head_dim_of, linear_shapes

PAGE_ROWS = 16
"""Rank rows of a page, as `lora_kernels` has it; a test holds the two together."""
STAGING_BUFFERS = 2
"""Layers on their way to a GPU's pool: one is copied to the device while another is scattered to its pages."""
INT8_BLOCK, INT8_BLOCK_BYTES = 32, 32 * (32 + 4)
"""Rows and columns of a block of eight-bit weights, and its bytes, a scale a row among them; likewise."""
_FLOAT = ITEM_SIZES["float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What the flags ask for, under their names; see `services.inference.config`."""

    dtype: str = "bfloat16"
    quantization: str = "none"
    max_loras: int
    max_lora_rank: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    tensor_parallel_size: int = 1
    fully_sharded_loras: bool = False


@dataclass(frozen=True, slots=True)
class Device:
    """What a device has, in bytes, and the share of all of it that may be taken."""

    total_bytes: int
    free_bytes: int
    utilization: float

    @property
    def budget(self) -> int:
        return min(int(self.total_bytes * self.utilization), self.free_bytes)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One line of the table. how: where the number is from"""

    what: str
    bytes: int
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by what they are for, and the KV blocks that come of it.

    block_bytes: of one KV block, the keys and values of all layers
    device: None where the flags decide
    """

    room: Room
    weights: int
    slot_pool: int
    staging: int
    activations: int
    graphs: int
    block_bytes: int
    kv_cache: int
    device: Device | None = None
    measured: bool = False

    @property
    def num_blocks(self) -> int:
        """KV blocks, the null block included."""
        return self.kv_cache // self.block_bytes

    @property
    def least_kv_cache(self) -> int:
        """Blocks for one request of the full length, and the null block."""
        return (1 - (-self.room.max_model_len // self.room.block_size)) * self.block_bytes

    def with_measured(self, activations: int, graphs: int) -> MemoryPlan:
        """The same with what a device measured, and the KV cache that leaves.

        Raises FailedPrecondition when that is too little.
        """
        assert self.device is not None, "only a device measures"
        return replace(self, activations=activations, graphs=graphs, measured=True)._filled()

    def rows(self) -> list[PlanRow]:
        room = self.room
        pages, found = paged(room.max_lora_rank) // PAGE_ROWS, "measured" if self.measured else "computed"
        rows = [
            PlanRow("weights", self.weights, self._weights_in + self._part),
            PlanRow("slot pool", self.slot_pool, f"{room.max_loras} adapters × {pages} pages of {PAGE_ROWS} ranks"),
            PlanRow(
                "activations",
                self.activations,
                f"{room.max_num_batched_tokens} tokens, {room.max_num_seqs} sampled: {found}",
            ),
            PlanRow(
                "KV cache",
                self.kv_cache,
                f"{self.num_blocks} blocks of {room.block_size} tokens: "
                f"{'as the flags say' if self.device is None else 'the rest'}",
            ),
        ]
        if self.device is None:
            return [*rows, PlanRow("together", self._needs + self.kv_cache, "no device to fill")]
        graphs = f"{2 * len(decode_buckets(room.max_num_seqs))} of decode, to {room.max_num_seqs} requests: {found}"
        rows.insert(2, PlanRow("staging", self.staging, f"{STAGING_BUFFERS} layers of an adapter in float32"))
        rows.insert(4, PlanRow("CUDA graphs", self.graphs, graphs))
        device = self.device
        how = f"{device.utilization:.0%} of {mib(device.total_bytes)}"
        if device.budget == device.free_bytes:
            how = f"what is free of {mib(device.total_bytes)}"
        return [*rows, PlanRow("budget", device.budget, how)]

    def table(self) -> str:
        """The rows as aligned text."""
        lines = [(row.what, mib(row.bytes), row.how) for row in self.rows()]
        widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
        return "\n".join(f"{what:<{widths[0]}}  {size:>{widths[1]}}  {how}" for what, size, how in lines)

    @property
    def _weights_in(self) -> str:
        room = self.room
        return room.dtype if room.quantization == "none" else f"{room.quantization}, the others {room.dtype}"

    @property
    def _part(self) -> str:
        size = self.room.tensor_parallel_size
        return "" if size == 1 else f"; all this on each of {size} ranks"

    @property
    def _needs(self) -> int:
        return self.weights + self.slot_pool + self.staging + self.activations + self.graphs

    def _filled(self) -> MemoryPlan:
        assert self.device is not None
        rest = self.device.budget - self._needs
        if rest < self.least_kv_cache:
            raise self._too_small(self.least_kv_cache - rest)
        return replace(self, kv_cache=rest // self.block_bytes * self.block_bytes)

    def _too_small(self, lacking: int) -> FailedPrecondition:
        assert self.device is not None
        device, room = self.device, self.room
        of_steps = {"activations": self.activations, "CUDA graphs": self.graphs}
        steps = "".join(f", {what} {mib(size)}" for what, size in of_steps.items() if size)
        taken = (
            f"weights {mib(self.weights)}, slot pool {mib(self.slot_pool)}{steps} and the KV cache of one "
            f"request of {room.max_model_len} tokens {mib(self.least_kv_cache)}"
        )
        return FailedPrecondition(
            "DEVICE_TOO_SMALL",
            f"the device has {mib(device.total_bytes)}, {mib(device.free_bytes)} of it free, and "
            f"--gpu-memory-utilization {device.utilization:g} lets {mib(device.budget)} be taken; {taken} are "
            f"{mib(lacking)} more: {self._remedy(lacking)}",
            lacking_bytes=lacking,
            budget_bytes=device.budget,
        )

    def _remedy(self, lacking: int) -> str:
        """What to lower: the flags that alone could give what is lacking, else all of them."""
        assert self.device is not None
        if self.weights >= self.device.budget:
            return (
                "the weights alone do not fit; raise --tensor-parallel-size or --gpu-memory-utilization, or take a "
                "larger device"
            )
        by_flag = {"--max-loras or --max-lora-rank": self.slot_pool, "--max-model-len": self.least_kv_cache}
        if self.activations:
            by_flag["--max-num-batched-tokens or --max-num-seqs"] = self.activations + self.graphs
        enough = [flags for flags, size in by_flag.items() if size > lacking]
        return "lower " + (", or ".join(enough) if enough else ", and ".join(by_flag))


def plan_memory(
    config: Mapping[str, Any],
    room: Room,
    *,
    kv_cache_bytes: int = 0,
    device: Device | None = None,
    to_measure: bool = False,
) -> MemoryPlan:
    """Plan a model (its Hugging Face config) into a device, or, without one, by the bytes the flags give the KV cache.

    to_measure: whether activations and graphs are to be measured, and count for nothing yet; else they are computed
    Raises FailedPrecondition when the device is too small, or the model cannot be cut into so many parts;
    InvalidArgument when the config lacks a field.
    """
    check_parts(config, room.tensor_parallel_size, room.fully_sharded_loras)
    item = ITEM_SIZES[room.dtype]
    plan = MemoryPlan(
        room=room,
        weights=weight_bytes(config, room),
        slot_pool=room.max_loras
        * adapter_elements(config, paged(room.max_lora_rank), room.tensor_parallel_size, room.fully_sharded_loras)
        * item,
        staging=0 if device is None else staging_bytes(config, room.max_lora_rank),
        activations=0 if to_measure else activation_bytes(config, room),
        graphs=0 if to_measure or device is None else graph_bytes(config, room),
        block_bytes=kv_elements(config) // room.tensor_parallel_size * item * room.block_size,
        kv_cache=kv_cache_bytes // room.tensor_parallel_size,
        device=device,
    )
    return plan if device is None else plan._filled()


def weight_bytes(config: Mapping[str, Any], room: Room) -> int:
    """Of the decoder's tensors, or one rank's, as they lie in memory. Eight bits hold the linears and the head."""
    elements, item = weight_elements(config, room.max_model_len, room.tensor_parallel_size), ITEM_SIZES[room.dtype]
    if room.quantization == "none":
        return elements * item
    matrices = [(shape.out_features, shape.in_features) for shape in linear_shapes(config).values()]
    matrices.append((int(config["vocab_size"]), int(config["hidden_size"])))
    blocks = sum(-(-out // INT8_BLOCK) * -(-width // INT8_BLOCK) for out, width in matrices)
    return blocks * INT8_BLOCK_BYTES + (elements - sum(out * width for out, width in matrices)) * item


def weight_elements(config: Mapping[str, Any], max_model_len: int, ranks: int = 1) -> int:
    """Numbers in the decoder's tensors, or one rank's, and in the rotary tables of that many positions."""
    hidden, vocab, layers = (int(config[key]) for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
    linears = sum(shape.in_features * shape.out_features for shape in linear_shapes(config).values())
    head = 0 if config.get("tie_word_embeddings") else -(-vocab // ranks) * hidden
    norms = (2 * layers + 1) * hidden
    return linears // ranks + vocab * hidden + head + norms + 2 * max_model_len * head_dim_of(config)


def kv_elements(config: Mapping[str, Any]) -> int:
    """Keys and values of one token, all layers."""
    shapes = linear_shapes(config)
    return sum(shape.out_features for name, shape in shapes.items() if name.endswith(("k_proj", "v_proj")))


def adapter_elements(config: Mapping[str, Any], rank: int, ranks: int = 1, fully_sharded: bool = False) -> int:
    """Numbers of an adapter of this rank on every linear: A [rank, in] and B [rank, out] of each, exactly.

    Of those a rank of `ranks` has the half that is cut as the linear is, and the other whole unless `fully_sharded`.
    """
    others = ranks if fully_sharded else 1
    numbers = 0
    for name, shape in linear_shapes(config).items():
        cut_by_input = name.endswith(("o_proj", "down_proj"))
        numbers += shape.in_features // (ranks if cut_by_input else others)
        numbers += shape.out_features // (others if cut_by_input else ranks)
    return rank * numbers


def staging_bytes(config: Mapping[str, Any], rank: int) -> int:
    """Of the buffers that take layers of adapters up to this rank, whole on every rank of a model that is cut."""
    layer = (shape for name, shape in linear_shapes(config).items() if name.startswith("model.layers.0."))
    return STAGING_BUFFERS * largest_run(((shape.in_features, shape.out_features) for shape in layer), rank)


def adapter_elements_by_thumb(config: Mapping[str, Any], rank: int) -> int:
    """The rule that circulates: 2 · rank · out a linear, with the MLP's inner width for all of its linears."""
    inner = int(config["intermediate_size"])
    return sum(
        2 * rank * (inner if ".mlp." in name else shape.out_features) for name, shape in linear_shapes(config).items()
    )


def activation_bytes(config: Mapping[str, Any], room: Room) -> int:
    """What the widest step holds at once, where attention reads the cache in place.

    Beside the residual stream and its norm (which is taken in float32) a linear group has its input, its output and
    what is made of that; LoRA has the input and the product of the widest slice in float32, and the shrink results of
    all adapters; the head has the logits of all requests, in the model's dtype and in float32.
    """
    item, hidden, inner, vocab = (
        ITEM_SIZES[room.dtype],
        *(int(config[key]) for key in ("hidden_size", "intermediate_size", "vocab_size")),
    )
    shapes = {name.split(".", 3)[3]: shape for name, shape in linear_shapes(config).items()}
    qkv = sum(shapes[f"self_attn.{name}_proj"].out_features for name in "qkv") // room.tensor_parallel_size
    inner //= room.tensor_parallel_size
    widest_slice = max(shape.out_features for shape in shapes.values())
    widest_input = max(shape.in_features for shape in shapes.values())
    most_slices = 3
    ranks = most_slices * room.max_loras * paged(room.max_lora_rank)
    of_base = 3 * hidden * item + 2 * hidden * _FLOAT + max(3 * qkv, 5 * inner) * item
    of_lora = (widest_input + widest_slice + 2 * ranks) * _FLOAT
    of_head = (vocab * (item + _FLOAT) + hidden * item) * room.max_num_seqs
    return max(room.max_num_batched_tokens * (of_base + of_lora), of_head)


def graph_bytes(config: Mapping[str, Any], room: Room) -> int:
    """What the CUDA graphs of decode keep. They share the memory of the largest one's steps, which run one at a time;
    beside it each has its own logits in float32."""
    largest = activation_bytes(config, replace(room, max_num_batched_tokens=room.max_num_seqs))
    return largest + 2 * sum(decode_buckets(room.max_num_seqs)) * int(config["vocab_size"]) * _FLOAT


def decode_buckets(most: int) -> list[int]:
    """Rows of decode steps that have buffers of their own, and two graphs, with adapters and without: a step is padded
    by less than a half, later an eighth."""
    return sorted({rows for rows in (1, 2, 4, *range(8, 64, 8), *range(64, most, 16)) if rows < most} | {most})


def paged(rank: int) -> int:
    """Rank rows of the pages that hold `rank` of them."""
    return -(-rank // PAGE_ROWS) * PAGE_ROWS


def mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
