"""Scattering staged rows and moving pages: torch and the interpreted kernel against a loop over values."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels import PAGE_ROWS, pool_copy
from lora_kernels.errors import MixedDtypes, NotContiguous, PageConflict, RankOverPool, ShapeMismatch
from lora_kernels.pool_copy import PageCopy, StagedRows, move, move_copies, scatter, scatter_copies
from tests.inference.adapters.lanes import HeldLanes
from tests.inference.adapters.packs import lying, make_pack, make_pool, poison
from tests.kernels.path_contract import DTYPES
from tests.kernels.pool_builder import bits

PAGES = 7


@pytest.fixture(params=["torch", "triton"])
def copy_pages(
    request: pytest.FixtureRequest, interpreted: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `scatter` and `move` call here: the interpreter's launch stands in for the GPU's."""
    if request.param == "triton":
        monkeypatch.setattr(pool_copy, "copy_pages_torch", interpreted["triton_pool"].copy_pages)


@pytest.mark.usefixtures("copy_pages")
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapters_layers_lie_in_the_slot_pool(dtype: torch.dtype, tmp_path: Path) -> None:
    """As the copies beside steps lay them there, and as copies within host memory do."""
    adapter = make_pack(tmp_path, "odd", r=9, rank_pattern={"q_proj": 33, "down_proj": 1}, dtype="bfloat16").adapter()
    lanes = HeldLanes()
    staged, direct = make_pool(dtype=dtype, lanes=lanes), make_pool(dtype=dtype)
    for pool in (staged, direct):
        poison(pool)
        pool.load(adapter)
    lanes.work()
    staged.poll()
    for expected, found in zip(lying(direct), lying(staged), strict=True):
        assert all(
            bits(one).equal(bits(other)) if isinstance(one, Tensor) else one == other
            for one, other in zip(expected, found, strict=True)
        )


def a_pool(dtype: torch.dtype, *widths: int) -> tuple[Tensor, list[Tensor]]:
    """A pool of NaN, and in it, after a few values of something else, an A or B of each width."""
    pool = torch.full((3 + sum(PAGES * PAGE_ROWS * width for width in widths),), torch.nan, dtype=dtype)
    parts = pool[3:].split([PAGES * PAGE_ROWS * width for width in widths])
    return pool, [part.view(-1, width) for part, width in zip(parts, widths, strict=True)]


@pytest.mark.usefixtures("copy_pages")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("staged_dtype", DTYPES)
def test_a_layer_run_lands_in_its_pages(dtype: torch.dtype, staged_dtype: torch.dtype) -> None:
    """Two layers' linears in one launch: a slice of the columns, a rank past a page, a linear that one layer lacks."""
    pool, (a, b, lacking) = a_pool(dtype, 300, 17, 8)
    staged = torch.randn(40 * 600, generator=torch.Generator().manual_seed(0)).to(staged_dtype)
    copies = [
        *scatter_copies(pool, a, (5, 0), StagedRows(offset=11, rank=21, stride=600, first_column=300)),
        *scatter_copies(pool, b, (2, 6, 1), StagedRows(offset=64, rank=33, stride=17)),
        *scatter_copies(pool, lacking, (3,), None),
    ]
    scatter(pool, staged, copies)

    expected_a = staged[11 : 11 + 21 * 600].view(21, 600)[:, 300:].to(dtype)
    expected_b = staged[64 : 64 + 33 * 17].view(33, 17).to(dtype)
    for into, pages, expected in ((a, (5, 0), expected_a), (b, (2, 6, 1), expected_b), (lacking, (3,), a[:0, :8])):
        rows = torch.cat([into[page * PAGE_ROWS : (page + 1) * PAGE_ROWS] for page in pages])
        assert bits(rows[: len(expected)]).equal(bits(expected.contiguous()))
        assert not rows[len(expected) :].any()
        assert into.isnan().all(dim=1).sum() == (PAGES - len(pages)) * PAGE_ROWS
    assert pool[:3].isnan().all()


@pytest.mark.usefixtures("copy_pages")
def test_aligned_rows_are_the_same_rows() -> None:
    pool, (a,) = a_pool(torch.bfloat16, 512)
    aligned = torch.full((8 + PAGES * PAGE_ROWS * 512,), torch.nan, dtype=torch.bfloat16)
    staged = torch.randn(16 * 512).bfloat16()
    scatter(pool, staged, scatter_copies(pool, a, (4,), StagedRows(0, 10, 512)))
    scatter(aligned, staged, scatter_copies(aligned, aligned[8:].view(-1, 512), (4,), StagedRows(0, 10, 512)))
    assert bits(aligned[8:]).equal(bits(pool[3:]))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("copy_pages")
@given(order=st.permutations(range(PAGES)), count=st.integers(0, PAGES // 2), width=st.integers(1, 40))
def test_moved_pages_keep_their_bits(order: list[int], count: int, width: int) -> None:
    pool, (a,) = a_pool(torch.float16, width)
    a.view(torch.int16).copy_(torch.arange(a.numel()).view_as(a) % 60000 - 30000)  # NaN and inf among them
    before = bits(a.clone()).view(PAGES, PAGE_ROWS, width)
    moves = list(zip(order[:count], order[count : 2 * count], strict=True))
    move(pool, move_copies(pool, a, moves))
    came_from = {new: old for old, new in moves}
    for page, after in enumerate(bits(a).view(PAGES, PAGE_ROWS, width)):
        assert after.equal(before[came_from.get(page, page)])


def test_what_would_write_wrongly_is_refused() -> None:
    pool, (a, b) = a_pool(torch.float32, 20, 8)
    before = bits(pool.clone())
    staged = torch.ones(64 * 20)
    fits = scatter_copies(pool, a, (1,), StagedRows(0, 16, 20))
    with pytest.raises(RankOverPool, match="33 rows"):
        scatter_copies(pool, a, (1, 2), StagedRows(0, 33, 20))
    with pytest.raises(ShapeMismatch, match="columns 8 to 28"):
        scatter_copies(pool, a, (1,), StagedRows(0, 16, 24, first_column=8))
    with pytest.raises(ShapeMismatch, match="no view"):
        scatter_copies(pool, torch.empty(16, 20), (0,), StagedRows(0, 16, 20))
    with pytest.raises(NotContiguous):
        scatter_copies(pool, a[:, :10], (0,), StagedRows(0, 16, 10))
    with pytest.raises(ShapeMismatch, match="leaves the pool"):
        scatter(pool, staged[: 16 * 20 - 1], fits)
    with pytest.raises(ShapeMismatch, match="leaves the pool"):
        scatter(pool, staged, scatter_copies(pool, b, (PAGES,), StagedRows(0, 16, 8)))
    with pytest.raises(ShapeMismatch, match="leaves the pool"):
        scatter(pool, staged, [PageCopy(0, 0, PAGE_ROWS + 1, 20, 20)])
    with pytest.raises(MixedDtypes):
        scatter(pool, staged.int(), fits)
    with pytest.raises(NotContiguous):
        scatter(pool, torch.ones(64 * 40)[::2], fits)
    with pytest.raises(PageConflict):
        scatter(pool, staged, fits + fits)
    with pytest.raises(PageConflict):
        move(pool, move_copies(pool, a, [(0, 1), (1, 2)]))
    assert bits(pool).equal(before)
