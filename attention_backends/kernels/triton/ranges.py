"""Attention of single query tokens over ranges of keys (kernels/ranges.py) in Triton, in two launches.

Documents make many short ranges, beside which another token may have one long range. So all tiles of keys are one line,
which the programs of the first kernel divide into equal parts. A program turns a token in its registers, attends to the
keys of its part, and stores one result for each token that it meets. The second kernel merges the results of a token in
their order: equal calls have equal results. This division is that of stream-K (arXiv 2301.03598, section 4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from starling.attention_backends.kernels.contract import Sizes
from starling.attention_backends.kernels.ranges import RANGE_FIELDS, ROW_FIELDS, TILE_KEYS, RangeTable
from starling.attention_backends.kernels.rotary import Rotation
from starling.attention_backends.kernels.triton.attend import LN2, LOG2E, attend
from starling.attention_backends.kernels.triton.decode import LANES, rows_that_fill
from starling.attention_backends.kernels.triton.launch import check_dtypes, head_block, make_tile

MIN_TILES = 4
"""Tiles of a program at least; with fewer, the results take more of the memory's time than the keys."""

MERGED_AT_ONCE = 8

TILE, ROW, RANGE, LEAST = map(tl.constexpr, (TILE_KEYS, ROW_FIELDS, RANGE_FIELDS, MIN_TILES))

UNSPECIALISED = (
    *("numbers", "block_table", "query_start_loc", "seq_lens", "num_tokens", "programs", "table_stride"),
    *("parts", "part_lses", "rows_at", "ranges_at"),
)
"""Arguments of which one compiled kernel takes every value (as in attend.py)."""


@triton.jit
def find_range(ranges, tile, num_ranges):
    """The range that a tile of work is in: the last one with no more tiles before it."""
    low = 0
    high = num_ranges
    while low < high:
        middle = (low + high) // 2
        if tl.load(ranges + middle * RANGE + 4) <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def load_turned(
    query,
    cos,
    sin,
    turn,
    query_stride,
    valid,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
    IS_NEOX: tl.constexpr,
):
    """(lanes, BLOCK_D) in the query's dtype: its heads, turned back in float32.

    Args:
        query: (lanes,) pointers to the heads of a token.
        turn: by how many positions.
        valid: (lanes,) bool, which lanes are heads.
    """
    lane_d = tl.arange(0, BLOCK_D)
    is_turned = lane_d < 2 * PAIRS
    if IS_NEOX:
        is_first = lane_d < PAIRS
        pair = tl.where(is_first, lane_d, lane_d - PAIRS)
        other = tl.where(is_first, lane_d + PAIRS, lane_d - PAIRS)
    else:
        is_first = lane_d % 2 == 0
        pair = lane_d // 2
        other = lane_d + 1 - 2 * (lane_d % 2)
    other = tl.where(is_turned, other, lane_d)
    at = turn.to(tl.int64) * PAIRS + pair
    c = tl.load(cos + at, mask=is_turned, other=1.0)
    s = tl.load(sin + at, mask=is_turned, other=0.0)
    s = tl.where(is_first, s, -s)
    mask = valid[:, None] & (lane_d < HEAD_SIZE)[None, :]
    own = tl.load(query[:, None] + lane_d[None, :] * query_stride, mask=mask, other=0.0)
    partner = tl.load(query[:, None] + other[None, :] * query_stride, mask=mask, other=0.0)
    return (own.to(tl.float32) * c[None, :] + partner.to(tl.float32) * s[None, :]).to(own.dtype)


@triton.jit
def tiles_of_a_program(tiles, programs):
    """How many tiles of work each program has; the last ones may have fewer, or none."""
    return tl.maximum(tl.cdiv(tiles, programs), LEAST)


@triton.jit(do_not_specialize=UNSPECIALISED)
def attend_ranges_kernel(
    query,
    key_cache,
    value_cache,
    parts,
    part_lses,
    numbers,
    rows_at,
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
    table_stride,
    GROUP: tl.constexpr,
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
    """Grid (programs, KV heads). Program g has the tiles from g n on. Its result for the row of place p is part g + p.

    Both numbers only grow along the line of tiles, so no two results have one part, and those of a row are neighbours.

    Args:
        parts, part_lses: (programs + rows, H, Dv) and (programs + rows, H) float32, contiguous.
        rows_at, ranges_at: where in ``numbers`` its rows and its ranges begin.
        scale, softcap, UPCAST: as in attend.py.
        num_tokens: of the query. A table of another step, as a CUDA graph may find, has no token behind it read.
    """
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    num_ranges = tl.load(numbers)
    tiles = tl.load(numbers + 2)
    count = tiles_of_a_program(tiles, tl.num_programs(0))
    tile = program * count
    end = tl.minimum(tile + count, tiles)
    if tile >= end:
        return
    rows = numbers + rows_at
    ranges = numbers + ranges_at
    number = find_range(ranges, tile, num_ranges)
    place = tl.load(ranges + number * RANGE)

    heads = tl.num_programs(1) * GROUP
    lane = tl.arange(0, BLOCK_M)
    lane_v = tl.arange(0, BLOCK_DV)
    valid = lane < GROUP
    head = kv_head * GROUP + lane
    keys = key_cache + kv_head.to(tl.int64) * key_head_stride
    values = value_cache + kv_head.to(tl.int64) * value_head_stride
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    while tile < end:
        first = tl.load(ranges + number * RANGE + 1)
        stop = tl.load(ranges + number * RANGE + 2)
        turn = tl.load(ranges + number * RANGE + 3)
        before = tl.load(ranges + number * RANGE + 4)
        row = tl.load(rows + place * ROW).to(tl.int64)
        token = tl.load(query_start_loc + row).to(tl.int64)
        low = first + (tile - before) * TILE
        tile = tl.minimum(before + tl.cdiv(stop - first, TILE), end)
        high = tl.minimum(tl.minimum(first + (tile - before) * TILE, stop), tl.load(seq_lens + row))
        at = query + token * query_token_stride + head * query_head_stride
        q = load_turned(
            at, cos, sin, turn, query_stride, valid & (token < num_tokens), HEAD_SIZE, BLOCK_D, PAIRS, IS_NEOX
        )
        if UPCAST:
            q = q.to(tl.float32)
        position = high - 1 + tl.zeros([BLOCK_M], dtype=tl.int32)
        page_ids = block_table + row * table_stride
        masked_from = low + tl.maximum(high - low, 0) // BLOCK_N * BLOCK_N
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
        next_place = tl.load(ranges + number * RANGE, mask=tile < end, other=-1)
        if next_place != place:
            has_key = total > 0
            part = (program + place).to(tl.int64) * heads + head
            part_lse = tl.where(has_key, (peak + tl.log2(total)) * LN2, float("-inf"))
            tl.store(part_lses + part, part_lse, mask=valid)
            stored = acc / tl.where(has_key, total, 1.0)[:, None]
            stored_mask = valid[:, None] & (lane_v < HEAD_SIZE_V)[None, :]
            tl.store(parts + part[:, None] * HEAD_SIZE_V + lane_v[None, :], stored, mask=stored_mask)
            acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
            peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
            total = tl.zeros([BLOCK_M], dtype=tl.float32)
        place = next_place


@triton.jit(do_not_specialize=UNSPECIALISED)
def merge_ranges_kernel(
    out,
    parts,
    part_lses,
    numbers,
    rows_at,
    query_start_loc,
    programs,
    num_tokens,
    out_token_stride,
    out_head_stride,
    HEAD_SIZE_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid (rows at most, heads). Merges the parts of a row's token, BLOCK_P at a time.

    Args:
        programs: of the first kernel, for each KV head.
    """
    place = tl.program_id(0)
    head, heads = tl.program_id(1), tl.num_programs(1)
    if place >= tl.load(numbers + 1):
        return
    count = tiles_of_a_program(tl.load(numbers + 2), programs)
    rows = numbers + rows_at
    row = tl.load(rows + place * ROW).to(tl.int64)
    first = tl.load(rows + place * ROW + 1) // count + place
    stop = (tl.load(rows + (place + 1) * ROW + 1) - 1) // count + place + 1
    lane_v = tl.arange(0, BLOCK_DV)
    peak = tl.full([], float("-inf"), dtype=tl.float32)
    total = tl.full([], 0.0, dtype=tl.float32)
    acc = tl.zeros([BLOCK_DV], dtype=tl.float32)
    for start in range(first, stop, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = part.to(tl.int64) * heads + head
        lse = tl.load(part_lses + at, mask=part < stop, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        # For a token that has met no key yet, any finite base avoids -inf - (-inf).
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp(lse - base)
        decay = tl.exp(peak - base)
        mask = (part < stop)[:, None] & (lane_v < HEAD_SIZE_V)[None, :]
        values = tl.load(parts + at[:, None] * HEAD_SIZE_V + lane_v[None, :], mask=mask, other=0.0)
        acc = acc * decay + tl.sum(weight[:, None] * values, 0)
        total = total * decay + tl.sum(weight, 0)
        peak = new_peak
    acc = acc / tl.where(total > 0, total, 1.0)
    token = tl.load(query_start_loc + row).to(tl.int64)
    out += token * out_token_stride + head * out_head_stride
    tl.store(out + lane_v, acc.to(out.dtype.element_ty), mask=(lane_v < HEAD_SIZE_V) & (token < num_tokens))


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

    Raises:
        ValueError: ``check_dtypes`` or ``make_tile`` refuses the operands.
    """
    keys, values = caches
    (_, heads, size), (page_size, kv_heads), value_size = query.shape, keys.shape[1:3], values.shape[3]
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
    check_dtypes(query.dtype, keys.dtype, capability)
    sizes = Sizes(table.max_rows, table.max_rows, heads, kv_heads, size, value_size, page_size)
    tile = make_tile(sizes, query.element_size(), LANES)
    if not table.max_rows:
        return
    programs = programs or rows_that_fill(query.device, kv_heads)
    parts = query.new_empty(programs + table.max_rows, heads, value_size, dtype=torch.float32)
    part_lses = parts.new_empty(programs + table.max_rows, heads)
    rows_at, ranges_at = table.offsets
    attend_ranges_kernel[(programs, kv_heads)](
        query,
        keys,
        values,
        parts,
        part_lses,
        table.numbers,
        rows_at,
        ranges_at,
        table.block_table,
        table.query_start_loc,
        table.seq_lens,
        rotation.cos,
        rotation.sin,
        scale / softcap if softcap else scale * LOG2E.value,
        softcap * LOG2E.value,
        len(query),
        *query.stride(),
        *keys.stride(),
        *values.stride(),
        table.block_table.stride(0),
        GROUP=sizes.group,
        PAGE_SIZE=page_size,
        HEAD_SIZE=size,
        HEAD_SIZE_V=value_size,
        PAIRS=rotation.cos.shape[1],
        IS_NEOX=rotation.is_neox_style,
        BLOCK_M=tile.lanes,
        BLOCK_N=tile.keys,
        BLOCK_D=head_block(size),
        BLOCK_DV=head_block(value_size),
        CAPPED=softcap != 0,
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    merge_ranges_kernel[(min(table.max_rows, len(query)), heads)](
        out,
        parts,
        part_lses,
        table.numbers,
        rows_at,
        table.query_start_loc,
        programs,
        len(query),
        *out.stride()[:2],
        HEAD_SIZE_V=value_size,
        BLOCK_DV=triton.next_power_of_2(value_size),
        BLOCK_P=MERGED_AT_ONCE,
    )
