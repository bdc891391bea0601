"""Attention of tokens over ranges of keys (kernels/ranges.py) in Triton, in two launches.

Documents make many short ranges, beside which another token may have one long range. So the tiles of work, each of 64
keys that a tile of queries meets, are one line, which the programs of the first kernel divide into equal parts. A
program rotates the queries in its registers and attends to the keys of its part. What it computes of a tile of queries
whose keys others have too is merged by the second kernel, in a fixed order: equal calls have equal results. This
division is that of stream-K (arXiv 2301.03598, section 4).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from starling.attention_backends.kernels.contract import Rotation, Sizes
from starling.attention_backends.kernels.ranges import PLACE_FIELDS, RANGE_FIELDS, TILE_KEYS, RangeTable
from starling.attention_backends.kernels.triton import paged
from starling.attention_backends.kernels.triton.attend import LN2, LOG2E, attend
from starling.attention_backends.kernels.triton.launch import Tile, check_dtypes, head_block, make_tile, power_of_two

PREFILL_LANES = 64
"""Lanes of a tile of many queries. With 128 lanes, programs spill registers."""

PREFILL_WARPS = {(8, 0): 8, (9, 0): 4, (10, 0): 8}
"""Compute capability from which on -> warps of a program of many queries. With four, two programs fit a multiprocessor
of 9.0; 8.0 spills their registers then, as 10.0 does with Triton 3.8, and the others have no shared memory for two
(tests/kernels/ranges_job.py compiles them all; ``starling selftest`` times them)."""

MOST_HEAD_SIZE = 128
"""Largest head size for programs of four warps; larger heads spill registers."""

MIN_TILES = 4
"""Tiles of a program at least; with fewer, partial results take more of the memory's time than keys."""

TILE, PLACE, RANGE, LEAST = map(tl.constexpr, (TILE_KEYS, PLACE_FIELDS, RANGE_FIELDS, MIN_TILES))

UNSPECIALISED = (
    *("numbers", "block_table", "query_start_loc", "seq_lens", "num_tokens", "programs", "table_stride"),
    *("parts", "part_lses", "places_at", "ranges_at"),
)
"""Arguments of which one compiled kernel takes every value (as in attend.py)."""


@triton.jit
def last_up_to(values, count, value, STRIDE: tl.constexpr):
    """Return the index of the last of some ascending values that is not above ``value``; the first one is not."""
    low = 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if tl.load(values + middle * STRIDE) <= value:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def load_rerotated(
    query,
    cos,
    sin,
    rotate_by,
    query_stride,
    valid,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
    IS_NEOX: tl.constexpr,
):
    """(lanes, BLOCK_D) in the query's dtype: its heads, rotated back in float32.

    Args:
        query: (lanes,) pointers to heads of tokens.
        rotate_by: by how many positions.
        valid: (lanes,) bool, which lanes are heads.
    """
    lane_d = tl.arange(0, BLOCK_D)
    is_rerotated = lane_d < 2 * PAIRS
    if IS_NEOX:
        is_first = lane_d < PAIRS
        pair = tl.where(is_first, lane_d, lane_d - PAIRS)
        other = tl.where(is_first, lane_d + PAIRS, lane_d - PAIRS)
    else:
        is_first = lane_d % 2 == 0
        pair = lane_d // 2
        other = lane_d + 1 - 2 * (lane_d % 2)
    other = tl.where(is_rerotated, other, lane_d)
    at = rotate_by.to(tl.int64) * PAIRS + pair
    c = tl.load(cos + at, mask=is_rerotated, other=1.0)
    s = tl.load(sin + at, mask=is_rerotated, other=0.0)
    s = tl.where(is_first, s, -s)
    mask = valid[:, None] & (lane_d < HEAD_SIZE)[None, :]
    own = tl.load(query[:, None] + lane_d[None, :] * query_stride, mask=mask, other=0.0)
    partner = tl.load(query[:, None] + other[None, :] * query_stride, mask=mask, other=0.0)
    return (own.to(tl.float32) * c[None, :] + partner.to(tl.float32) * s[None, :]).to(own.dtype)


@triton.jit
def tiles_of_a_program(tiles, programs):
    """Return the number of work tiles of each program; the last programs may have fewer, or none."""
    return tl.maximum(tl.cdiv(tiles, programs), LEAST)


@triton.jit
def lanes_of(
    numbers, places_at, place, kv_head, query_start_loc, num_tokens, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Token, head and validity of each lane of a place, (BLOCK_M,), and its tokens in the row from each one on."""
    fields = numbers + places_at + place * PLACE
    row = tl.load(fields).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    behind = tl.load(fields + 1) - lane // GROUP
    token = tl.load(query_start_loc + row + 1).to(tl.int64) - behind
    valid = (lane < QUERIES * GROUP) & (behind > 0) & (token < num_tokens)
    return token, kv_head * GROUP + lane % GROUP, valid, behind


@triton.jit(do_not_specialize=UNSPECIALISED)
def attend_ranges_kernel(
    query,
    key_cache,
    value_cache,
    out,
    parts,
    part_lses,
    numbers,
    places_at,
    ranges_at,
    block_table,
    query_start_loc,
    seq_lens,
    cos,
    sin,
    scale,
    softcap,
    num_tokens,
    query_token_stride,
    query_head_stride,
    query_stride,
    key_page_stride,
    key_slot_stride,
    key_head_stride,
    key_stride,
    value_page_stride,
    value_slot_stride,
    value_head_stride,
    value_stride,
    out_token_stride,
    out_head_stride,
    table_stride,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    PAIRS: tl.constexpr,
    IS_NEOX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (programs, KV heads). Program g has n tiles of work, from g n on.

    A place of which it has all tiles is written to ``out``. Of others it has those at the beginning or at the end of
    its tiles: the results are its parts 2 g and 2 g + 1.

    Args:
        parts, part_lses: (2 programs, KV heads, BLOCK_M, Dv) and (2 programs, KV heads, BLOCK_M) float32, contiguous.
        places_at, ranges_at: where in ``numbers`` its places and its ranges begin.
        scale, softcap, UPCAST: as in attend.py.
        num_tokens: of the query. A table of another step, as a CUDA graph may find, has no token behind it read.
    """
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    tiles = tl.load(numbers + 1)
    count = tiles_of_a_program(tiles, tl.num_programs(0))
    tile = program * count
    end = tl.minimum(tile + count, tiles)
    if tile >= end:
        return
    places = numbers + places_at
    ranges = numbers + ranges_at
    lane = tl.arange(0, BLOCK_M)
    lane_v = tl.arange(0, BLOCK_DV)
    keys = key_cache + kv_head.to(tl.int64) * key_head_stride
    values = value_cache + kv_head.to(tl.int64) * value_head_stride
    place = last_up_to(places + 2, tl.load(numbers), tile, PLACE)
    while tile < end:
        row = tl.load(places + place * PLACE).to(tl.int64)
        work = tl.load(places + place * PLACE + 2)
        stop_of_work = tl.load(places + (place + 1) * PLACE + 2)
        number = tl.load(places + place * PLACE + 3)
        num_ranges = tl.load(places + place * PLACE + 4) - number
        number += last_up_to(ranges + number * RANGE + 3, num_ranges, tile - work, RANGE)
        # fmt: off
        token, head, valid, behind = lanes_of(
            numbers, places_at, place, kv_head, query_start_loc, num_tokens, GROUP, QUERIES, BLOCK_M
        )
        # fmt: on
        position = tl.load(seq_lens + row) - behind
        lowest = tl.min(position, 0)
        highest = tl.max(tl.where(valid, position, lowest), 0)
        at = query + token * query_token_stride + head * query_head_stride
        page_ids = block_table + row * table_stride
        acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        begin = tile
        stop_here = tl.minimum(stop_of_work, end)
        while tile < stop_here:
            first = tl.load(ranges + number * RANGE)
            stop = tl.load(ranges + number * RANGE + 1)
            rotate_by = tl.load(ranges + number * RANGE + 2)
            start = work + tl.load(ranges + number * RANGE + 3)
            low = first + (tile - start) * TILE
            tile = tl.minimum(start + tl.cdiv(stop - first, TILE), stop_here)
            high = tl.minimum(tl.minimum(first + (tile - start) * TILE, stop), highest + 1)
            q = load_rerotated(at, cos, sin, rotate_by, query_stride, valid, HEAD_SIZE, BLOCK_D, PAIRS, IS_NEOX)
            if UPCAST:
                q = q.to(tl.float32)
            # Whole blocks that every query sees need no mask.
            masked_from = low + tl.maximum(tl.minimum(high, lowest + 1) - low, 0) // BLOCK_N * BLOCK_N
            # fmt: off
            acc, peak, total = attend(
                acc, peak, total, q, position, low, masked_from, keys, values, page_ids,
                key_page_stride, key_slot_stride, key_stride, value_page_stride, value_slot_stride, value_stride,
                scale, softcap, 0, PAGE_SIZE, HEAD_SIZE, HEAD_SIZE_V, BLOCK_N, BLOCK_D, BLOCK_DV,
                CAPPED, WINDOWED=False, MASKED=False, UPCAST=UPCAST,
            )
            acc, peak, total = attend(
                acc, peak, total, q, position, masked_from, high, keys, values, page_ids,
                key_page_stride, key_slot_stride, key_stride, value_page_stride, value_slot_stride, value_stride,
                scale, softcap, 0, PAGE_SIZE, HEAD_SIZE, HEAD_SIZE_V, BLOCK_N, BLOCK_D, BLOCK_DV,
                CAPPED, WINDOWED=False, MASKED=True, UPCAST=UPCAST,
            )
            # fmt: on
            number += 1
        has_key = total > 0
        acc = acc / tl.where(has_key, total, 1.0)[:, None]
        mask = valid[:, None] & (lane_v < HEAD_SIZE_V)[None, :]
        if (begin == work) & (stop_here == stop_of_work):
            out_at = token * out_token_stride + head * out_head_stride
            tl.store(out + out_at[:, None] + lane_v[None, :], acc.to(out.dtype.element_ty), mask=mask)
        else:
            part = 2 * program + (begin != program * count).to(tl.int32)
            part_at = (part.to(tl.int64) * tl.num_programs(1) + kv_head) * BLOCK_M + lane
            lse = tl.where(has_key, (peak + tl.log2(total)) * LN2, float("-inf"))
            tl.store(part_lses + part_at, lse, mask=valid)
            tl.store(parts + part_at[:, None] * HEAD_SIZE_V + lane_v[None, :], acc, mask=mask)
        place += 1


@triton.jit(do_not_specialize=UNSPECIALISED)
def merge_ranges_kernel(
    out,
    parts,
    part_lses,
    numbers,
    places_at,
    query_start_loc,
    programs,
    num_tokens,
    out_token_stride,
    out_head_stride,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (places at most, KV heads). Merges the parts of a place that several programs of the first kernel had.

    Args:
        programs: of the first kernel, for each KV head.
    """
    place = tl.program_id(0)
    kv_head = tl.program_id(1)
    if place >= tl.load(numbers):
        return
    count = tiles_of_a_program(tl.load(numbers + 1), programs)
    places = numbers + places_at
    work = tl.load(places + place * PLACE + 2)
    first = work // count
    last = (tl.load(places + (place + 1) * PLACE + 2) - 1) // count
    if first == last:
        return
    # fmt: off
    token, head, valid, _ = lanes_of(
        numbers, places_at, place, kv_head, query_start_loc, num_tokens, GROUP, QUERIES, BLOCK_M
    )
    # fmt: on
    lane = tl.arange(0, BLOCK_M)
    lane_v = tl.arange(0, BLOCK_DV)
    mask = valid[:, None] & (lane_v < HEAD_SIZE_V)[None, :]
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    for program in range(first, last + 1):
        part = 2 * program + (work > program * count).to(tl.int32)
        part_at = (part.to(tl.int64) * tl.num_programs(1) + kv_head) * BLOCK_M + lane
        lse = tl.load(part_lses + part_at, mask=valid, other=float("-inf"))
        new_peak = tl.maximum(peak, lse)
        # For a token that has met no key yet, any finite base avoids -inf - (-inf).
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay, weight = tl.exp(peak - base), tl.exp(lse - base)
        values = tl.load(parts + part_at[:, None] * HEAD_SIZE_V + lane_v[None, :], mask=mask, other=0.0)
        acc = acc * decay[:, None] + weight[:, None] * values
        total = total * decay + weight
        peak = new_peak
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_at = token * out_token_stride + head * out_head_stride
    tl.store(out + out_at[:, None] + lane_v[None, :], acc.to(out.dtype.element_ty), mask=mask)


def prefill_tile_queries(sizes: Sizes, element_bytes: int) -> int:
    """Tokens of a tile of queries, for rows of many; ``sizes`` are those of the layers."""
    return make_tile(sizes, element_bytes, PREFILL_LANES).queries(sizes.group)


def range_tile(sizes: Sizes, element_bytes: int, queries: int, capability: tuple[int, int] | None) -> Tile:
    """Return the tile of a program with ``queries`` queries.

    Args:
        capability: compute capability of the card, or None without a card.

    Raises:
        ValueError: the heads of one query do not fit a tile.
    """
    lanes = max(paged.DECODE_LANES, power_of_two(queries * sizes.group))
    tile = make_tile(sizes, element_bytes, lanes)
    if tile.lanes <= paged.DECODE_LANES or max(sizes.key_size, sizes.value_size) > MOST_HEAD_SIZE:
        return tile
    known = [each for each in PREFILL_WARPS if capability is None or each <= capability]
    return replace(tile, warps=PREFILL_WARPS[max(known, default=min(PREFILL_WARPS))])


def partial_bytes(programs: int, kv_heads: int, lanes: int, value_size: int) -> int:
    """Return the bytes of the partial results of a call while it runs."""
    return 4 * 2 * programs * kv_heads * lanes * (value_size + 1)


def attend_ranges(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    table: RangeTable,
    rotation: Rotation,
    out: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    programs: int | None = None,
    tile: Tile | None = None,
) -> None:
    """Write the attention of the table's tokens to ``out``; other tokens stay as they are.

    Reads no tensor on the host, so a CUDA graph can capture it. What it launches depends on shapes alone.

    Args:
        query: (T, H, D).
        caches: keys (pages, page size, KV heads, D) and values (pages, page size, KV heads, Dv), in the query's dtype.
        rotation: of the layer.
        out: (T, H, Dv) in the query's dtype, the last dimension contiguous.
        scale, softcap: as in contract.py.
        programs: for each KV head; by default, so many as fill the card.
        tile: of a program; by default, that of ``range_tile``. Its keys divide TILE_KEYS.

    Raises:
        ValueError: ``check_dtypes`` or ``range_tile`` refuses the operands.
    """
    keys, values = caches
    (tokens, heads, size), (page_size, kv_heads), value_size = query.shape, keys.shape[1:3], values.shape[3]
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
    check_dtypes(query.dtype, keys.dtype, capability)
    sizes = Sizes(table.max_places, tokens, heads, kv_heads, size, value_size, page_size)
    tile = tile or range_tile(sizes, query.element_size(), table.tile_queries, capability)
    places = min(table.max_places, tokens)
    if not places:
        return
    programs = programs or paged.rows_that_fill(paged.multiprocessors(query.device), kv_heads)
    parts = query.new_empty(2 * programs, kv_heads, tile.lanes, value_size, dtype=torch.float32)
    part_lses = parts.new_empty(2 * programs, kv_heads, tile.lanes)
    places_at, ranges_at = table.offsets
    shape = {"GROUP": sizes.group, "QUERIES": table.tile_queries, "HEAD_SIZE_V": value_size, "BLOCK_M": tile.lanes}
    attend_ranges_kernel[(programs, kv_heads)](
        query,
        keys,
        values,
        out,
        parts,
        part_lses,
        table.numbers,
        places_at,
        ranges_at,
        table.block_table,
        table.query_start_loc,
        table.seq_lens,
        rotation.cos,
        rotation.sin,
        scale / softcap if softcap else scale * LOG2E.value,
        softcap * LOG2E.value,
        tokens,
        *query.stride(),
        *keys.stride(),
        *values.stride(),
        *out.stride()[:2],
        table.block_table.stride(0),
        **shape,
        PAGE_SIZE=page_size,
        HEAD_SIZE=size,
        PAIRS=rotation.cos.shape[1],
        IS_NEOX=rotation.is_neox_style,
        BLOCK_N=tile.keys,
        BLOCK_D=head_block(size),
        BLOCK_DV=head_block(value_size),
        CAPPED=softcap != 0,
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    merge_ranges_kernel[(places, kv_heads)](
        out,
        parts,
        part_lses,
        table.numbers,
        places_at,
        table.query_start_loc,
        programs,
        tokens,
        *out.stride()[:2],
        **shape,
        BLOCK_DV=head_block(value_size),
        num_warps=tile.warps,
    )
