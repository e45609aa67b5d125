"""The compiled step against its definition, and the promise: a request's bits are its own, whoever shares its batch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels import BASE_ROW
from lora_kernels.cpu import BlockWeights, CpuCache, InvalidStepError, Packer, load_library
from lora_kernels.cpu.build import _AVX512, LEVELS, _best_level, _of_use, level_of_this_machine
from lora_kernels.cpu.packing import Storage
from tests.kernels.cpu_model import Machine, RandomModel, Story, alone, dequantised, random_sequences, small_shape

TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 5e-2}
"""Of logits of order five after two layers; in bf16 a value on the edge between two may round either way."""

ROUNDED = 0.2
"""The same where inputs of base weights are rounded too: far more values, any of which may be on an edge."""

ROUNDING = ("amx", "avx512bf16")
"""Levels whose products take bf16 where the dtype is that."""

RUNNABLE = list(LEVELS)[list(LEVELS).index(level_of_this_machine()) :]
SHAPES: dict[str, dict[str, int]] = {
    "odd": {},
    "one kv head a head": {"heads": 3, "kv_heads": 3, "head_dim": 64},
    "wide heads": {"heads": 4, "kv_heads": 1, "head_dim": 128, "hidden": 64},
    "heads of 96": {"heads": 2, "kv_heads": 2, "head_dim": 96, "inner": 33},
}


def check(model: RandomModel, stories: list[Story], found: list[Tensor], level: str = RUNNABLE[0]) -> None:
    rounds = level in ROUNDING and model.shape.dtype == torch.bfloat16
    for story, logits in zip(stories, found, strict=True):
        expected = model.reference(story.tokens, story.adapter, rounds=rounds)
        error = (logits.double() - expected).abs()
        assert float(error.max()) < (ROUNDED if rounds else TOLERANCES[model.shape.dtype])
        assert model.layers > 1 or float(error.median()) < 1e-4


@pytest.mark.parametrize("level", RUNNABLE)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_prompts_and_single_tokens_mixed(level: str, dtype: torch.dtype, tied: bool) -> None:
    """In one step a prompt, the rest of another and the next token of a third."""
    model = RandomModel(small_shape(dtype), tied=tied)
    stories = random_sequences(1, [40, 23, 70, 9], adapters=3)
    steps = [[(0, 39), (1, 5)], [(0, 1), (1, 18), (2, 65)], [(2, 1), (3, 9)], *[[(2, 1)]] * 4]
    found = Machine(model, threads=2, library=load_library(level)).run(stories, steps)
    check(model, stories, found, level)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_shapes(sizes: dict[str, int], dtype: torch.dtype) -> None:
    model = RandomModel(small_shape(dtype, **sizes))
    stories = random_sequences(2, [33, 21, 34, 5], adapters=3)
    steps = [[(0, 33), (1, 21), (2, 33), (3, 5)], [(2, 1)]]
    check(model, stories, Machine(model).run(stories, steps))


@pytest.mark.parametrize("level", RUNNABLE)
def test_one_layer_of_bf16(level: str) -> None:
    """Hardly a value is on an edge: what is left is the arithmetic, whatever the processor rounds."""
    model = RandomModel(small_shape(torch.bfloat16), layers=1)
    stories = random_sequences(1, [40, 23, 70, 9], adapters=3)
    steps = [[(index, len(each.tokens)) for index, each in enumerate(stories)]]
    check(model, stories, Machine(model, library=load_library(level)).run(stories, steps), level)


def test_a_context_of_several_parts() -> None:
    """Past 512 positions attention is summed in parts."""
    model = RandomModel(small_shape())
    stories = random_sequences(3, [1100], adapters=3)
    check(model, stories, Machine(model, threads=2).run(stories, [[(0, 600)], [(0, 499)], [(0, 1)]]))


IN_BLOCKS = {"hidden": 96, "inner": 160}
"""Sizes that a file's blocks of 32 inputs fit."""


@functools.cache
def machine(threads: int, seed: int, dtype: torch.dtype, bits: int = 32) -> Machine:
    """The seed shuffles slots, pages and blocks; the model is the same."""
    shape = small_shape(dtype, **(IN_BLOCKS if bits == 4 else {}))
    return Machine(RandomModel(shape, bits=bits), threads=threads, seed=seed)


@functools.cache
def solo_logits(length: int, index: int, dtype: torch.dtype, bits: int = 32) -> Tensor:
    """A token a step, nobody beside it: what every other way must equal bit by bit."""
    return alone(machine(1, 0, dtype, bits), story(length, index))


def story(length: int, index: int) -> Story:
    return random_sequences(10 * length + index, [length] * (index + 1), adapters=3)[index]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[list[tuple[int, int]]]]:
    """Stories by (length, index), and steps that take any part of any of them until all are done."""
    lengths = [1, 15, 16, 17, 60, 64, 65, 130, 520]
    stories = draw(st.lists(st.tuples(st.sampled_from(lengths), st.integers(0, 3)), min_size=1, max_size=5))
    left = {index: length for index, (length, _) in enumerate(stories)}
    steps = []
    while left:
        chosen = draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        step = []
        for index in chosen:
            least = max(1, left[index] // 4)  # so that schedules end
            count = draw(st.integers(least, left[index]))
            step.append((index, count))
            left[index] -= count
            if not left[index]:
                del left[index]
        steps.append(step)
    return stories, steps


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@settings(max_examples=15, deadline=None)
@given(schedule=schedules(), threads=st.integers(1, 3), seed=st.integers(0, 3))
def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype, bits: int, schedule: Any, threads: int, seed: int) -> None:
    """Any company, any chunks, any slots, pages and blocks, any number of threads."""
    named, steps = schedule
    found = machine(threads, seed, dtype, bits).run([story(*name) for name in named], steps)
    for name, logits in zip(named, found, strict=True):
        assert torch.equal(logits, solo_logits(*name, dtype, bits)), f"a story of {name} differs"


# ---- base weights in blocks


@pytest.mark.parametrize(
    ("level", "dtype", "bits"),
    [(level, torch.float32, bits) for level in RUNNABLE for bits in (8, 4)]
    + [(level, torch.bfloat16, bits) for level in RUNNABLE for bits in (8, 4) if bits == 4 or level in ROUNDING],
)
@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    hidden=st.sampled_from([32, 96, 160]),
    inner=st.sampled_from([32, 64, 128]),
    odd=st.booleans(),
    scale=st.sampled_from([1.0, 1e-3, 3.0]),
    tied=st.booleans(),
)
def test_blocks_are_the_weights_they_stand_for(
    level: str,
    dtype: torch.dtype,
    bits: int,
    counts: list[int],
    hidden: int,
    inner: int,
    odd: bool,
    scale: float,
    tied: bool,
) -> None:
    """Bit for bit what comes of the weights themselves, whoever has an adapter and however many rows there are.

    Weights of the dtype, that is; where bf16 is multiplied in float32, so are eight bits, and the next test compares.
    """
    more = 7 if odd and bits == 8 else 0  # a file's blocks are whole
    shape = small_shape(dtype, hidden=hidden + more, inner=inner + more)
    model = RandomModel(shape, layers=1, tied=tied, bits=bits)
    for weight in model.linears[0]:
        weight[:, ::3] *= scale
        weight[1] = 0
        weight[2] *= 2.0**-20
    stories = random_sequences(7, counts, adapters=3)
    steps = [[(index, count) for index, count in enumerate(counts)]]
    library = load_library(level)
    ours = Machine(model, library=library).run(stories, steps)
    exact = Machine(dequantised(model, dtype), library=library, compress=False).run(stories, steps)
    for in_blocks, plain in zip(ours, exact, strict=True):
        assert torch.equal(in_blocks, plain)


@pytest.mark.parametrize("level", RUNNABLE)
@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(1, 210), min_size=1, max_size=3),
    hidden=st.sampled_from([32, 96, 161]),
    inner=st.sampled_from([33, 64, 100]),
    strays=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 10**6), st.integers(0, 2**16 - 1)), max_size=20),
    tied=st.booleans(),
)
def test_twelve_bits_are_bf16(
    level: str, counts: list[int], hidden: int, inner: int, strays: list[tuple[int, int, int]], tied: bool
) -> None:
    """Bit for bit, whatever a few weights are: NaN, infinity, zero, too small for an exponent, huge."""
    shape = small_shape(torch.bfloat16, hidden=hidden, inner=inner)
    model = RandomModel(shape, layers=1, tied=tied)
    for linear, place, bits in strays:
        weight = model.linears[0][linear].view(torch.int16).view(-1)
        weight[place % len(weight)] = bits - 2**16 * (bits >= 2**15)
    model.linears[0][3][:, 5] = 0
    stories = random_sequences(7, counts, adapters=3)
    steps = [[(index, count) for index, count in enumerate(counts)]]
    library = load_library(level)
    ours, plain = (Machine(model, library=library, compress=compress).run(stories, steps) for compress in (True, False))
    for compressed, stored in zip(ours, plain, strict=True):
        assert torch.equal(compressed.view(torch.int32), stored.view(torch.int32))


def test_twelve_bits_are_fewer() -> None:
    """Where products take bf16 from memory, and all but fifteen weights of every 32 x 32 are alike enough."""
    weight = torch.randn(70, 100).bfloat16()
    packer, plain = Packer(torch.bfloat16), Packer(torch.bfloat16, compress=False).pack(weight)
    found = packer.pack(weight)
    if level_of_this_machine() == "avx512bf16":
        assert found.storage == Storage.TWELVE_BITS
        assert found.data.nbytes == 3 * 4 * 1600
    else:
        assert torch.equal(found.data, plain.data)
    weight[33:65, 40:48] = torch.logspace(-18, 18, 32).bfloat16()[:, None]
    found, plain = packer.pack(weight), Packer(torch.bfloat16, compress=False).pack(weight)
    assert found.storage == plain.storage == Storage.AS_STORED
    assert torch.equal(found.data, plain.data)
    assert Packer(torch.float32).pack(weight.float()).storage == Storage.AS_STORED


@pytest.mark.parametrize("level", RUNNABLE)
def test_eight_bits_beside_bf16(level: str) -> None:
    """On any level, with adapters and a cache of bf16."""
    model = RandomModel(small_shape(torch.bfloat16), bits=8)
    stories = random_sequences(1, [40, 23, 70, 9], adapters=3)
    steps = [[(0, 39), (1, 5)], [(0, 1), (1, 18), (2, 65)], [(2, 1), (3, 9)], *[[(2, 1)]] * 4]
    found = Machine(model, threads=2, library=load_library(level)).run(stories, steps)
    check(dequantised(model, torch.bfloat16 if level in ROUNDING else torch.float32), stories, found, level)


def test_a_files_eight_bits_are_kept() -> None:
    """Or packed as the weights they stand for, where nothing is gained."""
    values = torch.randint(-128, 128, (40, 96), dtype=torch.int8)
    blocks = BlockWeights(values, torch.rand(40, 3) / 100)
    for dtype in TOLERANCES:
        packer = Packer(dtype)
        found, plain = packer.pack(blocks), packer.pack(blocks.dequantize().to(dtype))
        if load_library().multilora_keeps_blocks(dtype == torch.bfloat16):
            assert found.storage == Storage.EIGHT_BITS
            assert found.data.nbytes == 2 * 3 * 36 * 32
        else:
            assert torch.equal(found.data, plain.data)
    with pytest.raises(ValueError, match="another dtype"):
        Packer(torch.float32).pack(blocks.dequantize().bfloat16())


def test_blocks_fit_their_weights() -> None:
    values, scales = torch.zeros((5, 64), dtype=torch.int8), torch.zeros((5, 2))
    assert BlockWeights(values, scales).dequantize().shape == (5, 64)
    with pytest.raises(ValueError, match="a scale for every 32"):
        BlockWeights(values, scales, torch.zeros((5, 1)))
    with pytest.raises(ValueError, match="a scale for every 32"):
        BlockWeights(values[:, :40].contiguous(), torch.zeros((5, 1)))
    with pytest.raises(ValueError, match="int8 and float32"):
        BlockWeights(values, scales.half())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_eight_bits_do_not_hide_what_is_not_finite(value: float) -> None:
    model = RandomModel(small_shape(), bits=8)
    model.linears[0][6][3, 5] = value
    assert not Machine(model).result(story(17, 0)).finite.any()


def test_the_best_token_comes_with_the_step() -> None:
    found = machine(1, 0, torch.float32).result(story(60, 1))
    assert found.finite.all()
    assert found.best.tolist() == found.logits.argmax(-1).tolist()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e38])
def test_a_neighbours_overflow_stays_its_own(value: float) -> None:
    model = RandomModel(small_shape())
    poisoned = Machine(model)
    slot = poisoned.slots[0]
    for layer in poisoned.lora:
        for name, table in poisoned.tables.items():
            for index, pages in enumerate(table.pages):
                for page in pages[slot]:
                    layer[name].a[index, page * 16] = value
                    layer[name].b[index][page * 16] = value
    stories = [story(17, 0), Story(story(65, 2).tokens, 0), story(64, 2), story(65, 3)]
    found = poisoned.run(stories, [[(i, len(s.tokens)) for i, s in enumerate(stories)]])
    assert not found[1].isfinite().all(-1).any()
    for index, name in ((0, (17, 0)), (2, (64, 2)), (3, (65, 3))):
        assert torch.equal(found[index], solo_logits(*name, torch.float32))
    bad = poisoned.result(stories[1])
    assert not bad.finite.any()


BAD_VALUES: dict[str, tuple[str, Any]] = {
    "a token past the vocabulary": ("tokens", 101),
    "a negative token": ("tokens", -1),
    "a position past the rotary table": ("positions", 1200),
    "a negative position": ("positions", -1),
    "a gap in the positions": ("positions", 3),
    "a slot past the pool": ("slots", 4),
    "a slot below the base's": ("slots", -2),
    "two slots in a sequence": ("slots", 1),
    "a sequence without a block table": ("sequences", 1),
    "a negative sequence": ("sequences", -1),
    "a block past the cache": ("block_tables", 400),
    "a block that is none": ("block_tables", -1),
    "a row that is not there": ("sampled_rows", 20),
}


@pytest.mark.parametrize(("name", "value"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_indices_are_refused_before_the_call(name: str, value: int) -> None:
    tried = machine(1, 0, torch.float32)
    good = tried.batch([(Story([1] * 20, BASE_ROW), 0, 20, [5, 6])])
    bad = getattr(good, name).copy()
    bad.flat[-1] = value
    with pytest.raises(InvalidStepError, match=name if "sequence" not in name else "sequence"):
        tried.decoder.step(dataclasses.replace(good, **{name: bad}))


@pytest.mark.parametrize(
    "change",
    [
        {"positions": np.zeros(19, np.int32)},
        {"slots": np.zeros(20, np.int64)},
        {"tokens": np.zeros(40, np.int32)[::2]},
        {"block_tables": np.zeros((1, 1), np.int32)},
        {name: np.zeros(0, np.int32) for name in ("tokens", "positions", "slots", "sequences", "sampled_rows")},
    ],
    ids=["short", "of another type", "with strides", "too few blocks", "empty"],
)
def test_arrays_are_refused_before_the_call(change: dict[str, Any]) -> None:
    tried = machine(1, 0, torch.float32)
    good = tried.batch([(Story([1] * 20, BASE_ROW), 0, 20, [5, 6])])
    with pytest.raises(InvalidStepError):
        tried.decoder.step(dataclasses.replace(good, **change))


def test_blocks_hold_whole_groups_of_positions() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        CpuCache(torch.zeros(1, 2, 1, 16, 8), torch.zeros(1, 2, 1, 8, 16))


@pytest.mark.parametrize(
    ("vendor", "more", "lent", "best"),
    [
        ("AuthenticAMD", "avx512_bf16", False, "avx512bf16"),
        ("GenuineIntel", "avx512_bf16", False, "avx512"),
        ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", False, "avx512"),
        ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", True, "amx"),
        ("GenuineIntel", "", True, "avx512"),
    ],
)
def test_the_level_of_a_processor(vendor: str, more: str, lent: bool, best: str) -> None:
    cpuinfo = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {' '.join(sorted(_AVX512))} {more}\nbugs\t\t:\n\n"
    assert _best_level(_of_use(2 * cpuinfo, lambda: lent)) == best
