"""The attention kernel, and the one that puts the parts of a context together."""

# A kernel is Triton's language in Python's syntax: its arguments have no Python types, its constants are capitals.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

BLOCK_KEYS = 64
"""Keys multiplied at a time. Reasoned, not yet measured: with 64 lanes and 128 values a head, key and value blocks take
32 KiB of shared memory a stage."""

PART_KEYS = 512
"""Keys of a decode row that one program reads: a row of 8k tokens over 8 heads occupies 128 multiprocessors. Fixed, so
that its sum has one order whoever shares its batch."""

COMBINE_LAUNCH = {"num_warps": 1, "enable_fp_fusion": True}

LOG2_E = 1.4426950408889634


def launch_of(head_block: int, value_bytes: int) -> dict[str, int]:
    """Warps and stages for heads of so many values: wide ones leave shared memory and registers for one stage less."""
    wide = head_block * value_bytes > 256
    return {"num_warps": 8 if head_block > 128 else 4, "num_stages": 1 if wide else 2, "enable_fp_fusion": True}


# Compiled once for all batches: a step does not wait for a compiler because it has sixteen tiles.
@triton.jit(do_not_specialize=("table_stride", "tile_count", "parts", "heads"))
def attention_kernel(
    q,
    keys,
    values,
    out,
    sums,
    stats,
    block_tables,
    positions,
    tiles,
    scale,
    table_stride,
    q_stride,
    out_stride,
    key_stride,
    tile_count,
    parts,
    block_size,
    heads,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PART_KEYS: tl.constexpr,
):
    """A program for each tile, key head and part of the context.

    Semantics:
        for each row i of the tile, for each of the GROUP heads h that share the key head:
            softmax over j <= positions[i] of  scale * q[i, h] . k[j]   times v[j]
        PART_KEYS = 0: `out` gets it. Otherwise the part's keys alone are summed, and `sums` and `stats` (the largest
        score in base 2, the sum of weights) get what `combine_kernel` needs; parts past the position write nothing.
    Shape:
        grid: (tiles, kv_heads, parts)
        q, out: [rows, heads, HEAD_DIM], rows a stride apart    keys, values: [cache rows, kv_heads, HEAD_DIM]
        sums: [rows, heads, parts, HEAD_DIM] float32            stats: [rows, heads, parts, 2] float32
        block_tables, positions, tiles: see `PagedRows`         scale: with log2(e), as exponents are of 2
    Cost: keys and values of the context once a tile, 4 * HEAD_DIM FLOPs for each pair of row and key.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    sequence = tl.load(tiles + tile).to(tl.int64)
    first = tl.load(tiles + tile_count + tile)
    end = tl.load(tiles + 2 * tile_count + tile)

    lane = tl.arange(0, TOKENS * GROUP_BLOCK)
    row = first + lane // GROUP_BLOCK
    head = lane % GROUP_BLOCK
    inside = (row < end) & (head < GROUP)
    position = tl.load(positions + row, mask=inside, other=0)
    limit = tl.load(positions + end - 1) + 1
    first_key = 0
    if PART_KEYS > 0:
        first_key = part * PART_KEYS
        limit = tl.minimum(limit, first_key + PART_KEYS)

    if first_key < limit:
        column = tl.arange(0, HEAD_BLOCK)
        in_head = column < HEAD_DIM
        row_head = (kv_head * GROUP + head) * HEAD_DIM
        q_block = tl.load(
            q + row[:, None].to(tl.int64) * q_stride + row_head[:, None] + column[None, :],
            mask=inside[:, None] & in_head[None, :],
            other=0.0,
        )
        largest = tl.full((TOKENS * GROUP_BLOCK,), -1.0e30, tl.float32)
        weight = tl.full((TOKENS * GROUP_BLOCK,), 0.0, tl.float32)
        total = tl.full((TOKENS * GROUP_BLOCK, HEAD_BLOCK), 0.0, tl.float32)
        for start in range(first_key, limit, BLOCK_KEYS):
            key = start + tl.arange(0, BLOCK_KEYS)
            in_context = key < limit
            block = tl.load(block_tables + sequence * table_stride + key // block_size, mask=in_context, other=0)
            place = (block.to(tl.int64) * block_size + key % block_size) * key_stride + kv_head * HEAD_DIM
            k_block = tl.load(
                keys + place[None, :] + column[:, None], mask=in_context[None, :] & in_head[:, None], other=0.0
            )
            # "ieee": float32 is not rounded to TF32; 16-bit products are exact in float32 either way.
            scores = tl.dot(q_block, k_block, input_precision="ieee") * scale
            visible = (key[None, :] <= position[:, None]) & in_context[None, :]
            scores = tl.where(visible, scores, -1.0e30)
            higher = tl.maximum(largest, tl.reduce(scores, 1, tl.standard._elementwise_max))
            weights = tl.where(visible, tl.exp2(scores - higher[:, None]), 0.0)
            shrunk = tl.exp2(largest - higher)
            v_block = tl.load(
                values + place[:, None] + column[None, :], mask=in_context[:, None] & in_head[None, :], other=0.0
            )
            total = tl.dot(weights.to(v_block.dtype), v_block, total * shrunk[:, None], input_precision="ieee")
            weight = weight * shrunk + tl.reduce(weights, 1, tl.standard._sum_combine)
            largest = higher
        stored = inside[:, None] & in_head[None, :]
        if PART_KEYS > 0:
            entry = (row.to(tl.int64) * heads + kv_head * GROUP + head) * parts + part
            tl.store(sums + entry[:, None] * HEAD_DIM + column[None, :], total, mask=stored)
            tl.store(stats + entry * 2, largest, mask=inside)
            tl.store(stats + entry * 2 + 1, weight, mask=inside)
        else:
            weight = tl.where(inside, weight, 1.0)
            attended = (total / weight[:, None]).to(q_block.dtype)
            to = out + row[:, None].to(tl.int64) * out_stride + row_head[:, None] + column[None, :]
            tl.store(to, attended, mask=stored)


@triton.jit(do_not_specialize=("tile_count", "parts", "heads"))
def combine_kernel(
    out,
    sums,
    stats,
    positions,
    tiles,
    out_stride,
    tile_count,
    parts,
    heads,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PART_KEYS: tl.constexpr,
):
    """A program for each decode tile's row and head: its parts in ascending order.

    Semantics:
        out[i, h] = sum over p of 2^(m_p - m) * sums[i, h, p]  /  sum over p of 2^(m_p - m) * w_p
        with (m_p, w_p) = stats[i, h, p] and m the largest m_p; parts past the row's position are not read
    Shape:
        grid: (tiles, heads);   the rest as in `attention_kernel`
    """
    row = tl.load(tiles + tile_count + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, HEAD_BLOCK)
    in_head = column < HEAD_DIM
    used = tl.load(positions + row) // PART_KEYS + 1
    entry = (row * heads + head) * parts

    largest = tl.load(stats + entry * 2)
    weight = tl.load(stats + entry * 2 + 1)
    total = tl.load(sums + entry * HEAD_DIM + column, mask=in_head, other=0.0)
    for part in range(1, used):
        own = tl.load(stats + (entry + part) * 2)
        higher = tl.maximum(largest, own)
        kept = tl.exp2(largest - higher)
        added = tl.exp2(own - higher)
        weight = weight * kept + tl.load(stats + (entry + part) * 2 + 1) * added
        part_sum = tl.load(sums + (entry + part) * HEAD_DIM + column, mask=in_head, other=0.0)
        total = total * kept + part_sum * added
        largest = higher
    attended = (total / weight).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + head * HEAD_DIM + column, attended, mask=in_head)
