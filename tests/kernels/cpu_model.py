"""A small random decoder for the compiled backend's tests, its definition in float64, and a way to run schedules."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lora_kernels import BASE_ROW, PAGE_ROWS, LoraWeights, PageTable
from lora_kernels.cpu import (
    BlockWeights,
    CpuCache,
    CpuDecoder,
    DecoderShape,
    PackedLayer,
    Packer,
    StepBatch,
    StepResult,
)
from lora_kernels.reference import LoraSlice, apply_lora_reference

POSITIONS = 1200
BLOCK_SIZE = 16
GROUPS = {"qkv": (0, 1, 2), "o": (3,), "gate_up": (4, 5), "down": (6,)}


@dataclass(frozen=True)
class RandomModel:
    """Weights [out, in] and adapters as they are before anything is packed or paged.

    bits: of base weights, fewer than the dtype's in blocks: eight as the packer makes them, or four as a file has them
    ranks: ranks[adapter][linear], 0 for a linear it leaves alone
    adapters: adapters[layer][adapter][linear]
    """

    shape: DecoderShape
    layers: int = 2
    tied: bool = True
    bits: int = 32
    ranks: Sequence[Sequence[int]] = ((8,) * 7, (17, 0, 3, 33, 0, 16, 1), (0, 0, 0, 0, 5, 0, 0))
    seed: int = 0
    linears: list[list[Tensor]] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    adapters: list[list[list[LoraSlice | None]]] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        made = torch.Generator().manual_seed(self.seed)
        shape = self.shape

        def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
            return (torch.randn(rows, columns, generator=made) * gain / math.sqrt(columns)).to(shape.dtype)

        for _ in range(self.layers):
            self.linears.append([matrix(out, width) for out, width in linear_sizes(shape)])
            self.norms.extend(1 + torch.randn(shape.hidden, generator=made) / 5 for _ in range(2))
            self.adapters.append(
                [
                    [
                        LoraSlice(matrix(rank, width), matrix(rank, out, 0.5 * math.sqrt(out / rank)), 0.5 + index / 8)
                        if rank
                        else None
                        for index, (rank, (out, width)) in enumerate(zip(of_adapter, linear_sizes(shape), strict=True))
                    ]
                    for of_adapter in self.ranks
                ]
            )
        self.norms.append(torch.ones(shape.hidden))
        self.embeddings.extend(
            (matrix(shape.vocab, shape.hidden).float() * 5).to(shape.dtype) for _ in range(1 if self.tied else 2)
        )

    def reference(self, tokens: Sequence[int], adapter: int, *, rounds: bool = False) -> Tensor:
        """Logits [tokens, vocab] of a whole sequence in float64, keys and values rounded as the cache rounds them.

        rounds: so are the inputs of base weights, as where the processor multiplies bf16
        """
        shape, count = self.shape, len(tokens)
        x = self.embeddings[0][list(tokens)].double()
        cos, sin = (table[:count, None].double() for table in rotary(shape.head_dim))
        for layer in range(self.layers):
            h = _norm(x, self.norms[2 * layer], shape.norm_eps)
            q, k, v = self._group("qkv", layer, h, adapter, rounds)
            q, k, v = (t.view(count, -1, shape.head_dim) for t in (q, k, v))
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin).to(shape.dtype).double()
            k, v = (t.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for t in (k, v.to(shape.dtype).double()))
            scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(shape.head_dim)
            scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -math.inf)
            attended = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
            x = x + self._group("o", layer, attended, adapter, rounds)[0]
            h = _norm(x, self.norms[2 * layer + 1], shape.norm_eps)
            gate, up = self._group("gate_up", layer, h, adapter, rounds)
            x = x + self._group("down", layer, torch.nn.functional.silu(gate) * up, adapter, rounds)[0]
        return self._input(_norm(x, self.norms[-1], shape.norm_eps), rounds) @ self.embeddings[-1].double().T

    def _input(self, x: Tensor, rounds: bool) -> Tensor:
        return x.to(self.shape.dtype).double() if rounds else x

    def _group(self, group: str, layer: int, x: Tensor, adapter: int, rounds: bool) -> tuple[Tensor, ...]:
        weights = [self.linears[layer][index].double() for index in GROUPS[group]]
        outs = [len(weight) for weight in weights]
        y = self._input(x, rounds) @ torch.cat(weights).T
        own = {slot: [of[i] for i in GROUPS[group]] for slot, of in enumerate(self.adapters[layer])}
        return apply_lora_reference(y, x, [adapter] * len(x), own, outs).split(outs, dim=1)


@dataclass
class Story:
    """A request of the tests: its tokens and its adapter, `BASE_ROW` for none."""

    tokens: list[int]
    adapter: int


class Machine:
    """The model in the compiled backend: adapters in shuffled slots and pages, everything unused poisoned with NaN."""

    def __init__(
        self,
        model: RandomModel,
        *,
        threads: int = 1,
        seed: int = 0,
        library: ctypes.CDLL | None = None,
        compress: bool = True,
    ) -> None:
        shape, shuffled = model.shape, random.Random(seed)
        self._shuffled = shuffled
        self.slots = list(range(len(model.ranks) + 1))
        shuffled.shuffle(self.slots)
        self.tables = {name: self._table(model, linears) for name, linears in GROUPS.items()}
        self.lora = [{name: self._weights(model, layer, name) for name in GROUPS} for layer in range(model.layers)]
        blocks = 400
        heads = (model.layers, blocks, shape.kv_heads)
        self.cache = CpuCache(
            torch.full((*heads, shape.head_dim, BLOCK_SIZE), torch.nan, dtype=shape.dtype),
            torch.full((*heads, BLOCK_SIZE, shape.head_dim), torch.nan, dtype=shape.dtype),
        )
        self._free = list(range(1, blocks))
        shuffled.shuffle(self._free)
        packer = Packer(shape.dtype, library, int8=model.bits == 8, compress=compress)
        pack = (lambda weight: packer.pack(four_bits(weight))) if model.bits == 4 else packer.pack
        cosines, sines = rotary(shape.head_dim)
        self.decoder = CpuDecoder(
            shape,
            [
                PackedLayer(model.norms[2 * i], model.norms[2 * i + 1], tuple(map(pack, linears)))
                for i, linears in enumerate(model.linears)
            ],
            norm=model.norms[-1],
            head=pack(model.embeddings[-1]),
            embedding=None if model.tied else model.embeddings[0],
            cosines=cosines,
            sines=sines,
            cache=self.cache,
            lora=self.lora,
            tables=self.tables,
            threads=threads,
            library=library,
        )

    def run(self, sequences: Sequence[Story], steps: Sequence[Sequence[tuple[int, int]]]) -> list[Tensor]:
        """Logits [tokens computed, vocab] of each sequence. A step: (sequence, how many of its next tokens) in turn."""
        blocks = [[self._free.pop() for _ in range(-(-len(s.tokens) // BLOCK_SIZE))] for s in sequences]
        done = [0] * len(sequences)
        found: list[list[Tensor]] = [[] for _ in sequences]
        for step in steps:
            parts = [(sequences[i], done[i], count, blocks[i]) for i, count in step]
            logits = self.decoder.step(self.batch(parts)).logits.clone().split([count for _, count in step])
            for (i, count), rows in zip(step, logits, strict=True):
                done[i] += count
                found[i].append(rows)
        self._free += [block for of in blocks for block in of]
        return [torch.cat(rows) for rows in found]

    def batch(self, parts: Sequence[tuple[Story, int, int, Sequence[int]]]) -> StepBatch:
        """parts: (sequence, first position, rows, its blocks); the logits of every row are wanted."""
        most = max(len(blocks) for *_, blocks in parts)
        rows = [
            (s.tokens[p], p, self.slot(s.adapter), i)
            for i, (s, at, n, _) in enumerate(parts)
            for p in range(at, at + n)
        ]
        tokens, positions, slots, sequences = np.array(rows, np.int32).T.copy()
        tables = np.array([[*blocks, *[-1] * (most - len(blocks))] for *_, blocks in parts], np.int32)
        return StepBatch(tokens, positions, slots, sequences, tables, np.arange(len(rows), dtype=np.int32))

    def slot(self, adapter: int) -> int:
        return BASE_ROW if adapter == BASE_ROW else self.slots[adapter]

    def result(self, sequence: Story) -> StepResult:
        """One step over a whole sequence."""
        blocks = self._free[: -(-len(sequence.tokens) // BLOCK_SIZE)]
        return self.decoder.step(self.batch([(sequence, 0, len(sequence.tokens), blocks)]))

    def _table(self, model: RandomModel, linears: Sequence[int]) -> PageTable:
        slots, most = len(self.slots), max(-(-rank // PAGE_ROWS) for of in model.ranks for rank in of)
        pages = slots * most
        table = torch.zeros((len(linears), slots, max(1, most)), dtype=torch.int32)
        owned: list[list[tuple[int, ...]]] = [[() for _ in range(slots)] for _ in linears]
        for index, linear in enumerate(linears):
            free = list(range(pages))
            self._shuffled.shuffle(free)
            for adapter, ranks in enumerate(model.ranks):
                taken = tuple(free.pop() for _ in range(-(-ranks[linear] // PAGE_ROWS)))
                owned[index][self.slots[adapter]] = taken
                table[index, self.slots[adapter], : len(taken)] = torch.tensor(taken, dtype=torch.int32)
        return PageTable(table, owned, pages * PAGE_ROWS)

    def _weights(self, model: RandomModel, layer: int, group: str) -> LoraWeights:
        linears, table = GROUPS[group], self.tables[group]
        sizes = [linear_sizes(model.shape)[linear] for linear in linears]
        dtype = model.shape.dtype
        weights = LoraWeights(
            group,
            torch.full((len(linears), table.rows_per_slice, sizes[0][1]), torch.nan, dtype=dtype),
            tuple(torch.full((table.rows_per_slice, out), torch.nan, dtype=dtype) for out, _ in sizes),
            torch.zeros((len(linears), len(self.slots)), dtype=torch.int32),
            torch.full((len(linears), len(self.slots)), torch.nan),
        )
        for adapter, of_adapter in enumerate(model.adapters[layer]):
            slot = self.slots[adapter]
            for index, linear in enumerate(linears):
                lora = of_adapter[linear]
                if lora is None:
                    continue
                weights.ranks[index, slot], weights.scales[index, slot] = len(lora.a), lora.scale
                for place, page in enumerate(table.pages[index][slot]):
                    rows = slice(page * PAGE_ROWS, (page + 1) * PAGE_ROWS)
                    own = slice(place * PAGE_ROWS, (place + 1) * PAGE_ROWS)
                    for pool, values in ((weights.a[index], lora.a[own]), (weights.b[index], lora.b[own])):
                        pool[rows] = 0
                        pool[rows][: len(values)] = values
        return weights


def dequantised(model: RandomModel, dtype: torch.dtype) -> RandomModel:
    """The same model with the weights that its blocks say, as a dtype holds them."""
    made = dataclasses.replace(model, bits=32, linears=[], norms=[], adapters=[], embeddings=[])
    made.linears[:] = [[_said(weight, model.bits).to(dtype) for weight in layer] for layer in model.linears]
    made.embeddings[-1] = _said(model.embeddings[-1], model.bits).to(dtype)
    return made


def _said(weight: Tensor, bits: int) -> Tensor:
    """What blocks keep of a weight [out, in], in float32; in eight bits the largest of 32 inputs is 127 steps."""
    if bits == 4:
        return four_bits(weight).dequantize()
    out, width = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -width % 32)).view(out, -1, 32)
    scales = groups.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scales > 0, groups / scales, 0).round().clamp(-127, 127)
    return (steps * scales).view(out, -1)[:, :width].contiguous()


def four_bits(weight: Tensor) -> BlockWeights:
    """A weight as a file of GGUF's Q4_1 holds it: sixteen steps from the least of 32 inputs to the largest."""
    groups = weight.float().view(len(weight), -1, 32)
    least, most = groups.amin(-1).half().float(), groups.amax(-1)
    scales = ((most - least) / 15).half().float()
    steps = torch.where(scales[..., None] > 0, (groups - least[..., None]) / scales[..., None], 0).round().clamp(0, 15)
    return BlockWeights(steps.to(torch.int8).view(weight.shape), scales, least)


def small_shape(dtype: torch.dtype = torch.float32, **sizes: int) -> DecoderShape:
    """Odd sizes wherever they may be: nothing is a multiple of a panel or a register."""
    usual = {"vocab": 101, "hidden": 72, "inner": 88, "heads": 6, "kv_heads": 2, "head_dim": 16}
    return DecoderShape(**(usual | sizes), norm_eps=1e-5, dtype=dtype)


def linear_sizes(shape: DecoderShape) -> list[tuple[int, int]]:
    """(out, in) of q, k, v, o, gate, up and down."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, inner = shape.hidden, shape.inner
    return [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner)]


def rotary(head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(POSITIONS).float(), frequencies)
    return angles.cos(), angles.sin()


def random_sequences(seed: int, lengths: Sequence[int], adapters: int, vocab: int = 101) -> list[Story]:
    """Base and adapters in turn."""
    made = random.Random(seed)
    return [
        Story([made.randrange(vocab) for _ in range(length)], index % (adapters + 1) - 1)
        for index, length in enumerate(lengths)
    ]


def alone(machine: Machine, sequence: Story) -> Tensor:
    """Its logits, a token a step."""
    return machine.run([sequence], [[(0, 1)]] * len(sequence.tokens))[0]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
