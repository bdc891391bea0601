"""The Triton kernel of prefill and decode: tiles of queries against the paged keys of their row.

A program has a tile of BLOCK_Q queries of one row, with the GROUP heads that use one KV head: BLOCK_M lanes in all. It
loops over the keys that its queries may see, or over one part of them where the keys are split. The softmax is online
and in the exp2 domain (arXiv 2307.08691, section 3.1).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNSPECIALISED = ("block_table", "query_start_loc", "seq_lens", "window", "num_rows", "num_tokens", "table_stride")
"""Arguments of which one compiled kernel takes every value. They change with the step; no wide load depends on them.

For any other argument, Triton compiles a kernel of its own for an integer that is 1 or a multiple of 16, and for an
aligned pointer.
"""


@triton.jit
def find_row(query_start_loc, tile, num_rows, BLOCK_Q: tl.constexpr):
    """Find the row that a query tile belongs to. The tiles of row r start at query_start_loc[r] // BLOCK_Q + r.

    So every row has enough tiles, wherever it starts, and the host can size the grid without reading query lengths
    back from the device.
    """
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def tanh(x):
    """Compute tanh from the exponential of -2 |x|, which can't overflow."""
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    size = (1 - decay) / (1 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def attend(
    acc,
    peak,
    total,
    query,
    position,
    first,
    last,
    keys,
    values,
    page_ids,
    key_page_stride,
    key_slot_stride,
    key_stride,
    value_page_stride,
    value_slot_stride,
    value_stride,
    scale,
    softcap,
    window,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add the keys first <= n < last to the running (acc, peak, total) of a tile.

    Keys outside of that range are never read. Without MASKED, all keys of the range must be visible to all lanes, and
    their number must be a multiple of BLOCK_N.
    """
    lane_d = tl.arange(0, BLOCK_D)
    lane_v = tl.arange(0, BLOCK_DV)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_mask = (lane_d < HEAD_SIZE)[:, None]
        value_mask = (lane_v < HEAD_SIZE_V)[None, :]
        if MASKED:
            key_mask = key_mask & (key < last)[None, :]
            value_mask = value_mask & (key < last)[:, None]
            page_id = tl.load(page_ids + key // PAGE_SIZE, mask=key < last, other=0).to(tl.int64)
        else:
            page_id = tl.load(page_ids + key // PAGE_SIZE).to(tl.int64)
        slot = key % PAGE_SIZE
        key_at = page_id * key_page_stride + slot * key_slot_stride
        value_at = page_id * value_page_stride + slot * value_slot_stride

        k = tl.load(keys + key_at[None, :] + lane_d[:, None] * key_stride, mask=key_mask, other=0.0)
        k = k.to(tl.float32) if UPCAST else k.to(query.dtype)
        score = tl.dot(query, k, input_precision="ieee") * scale
        if CAPPED:
            score = softcap * tanh(score)
        if MASKED:
            visible = (key[None, :] < last) & (key[None, :] <= position[:, None])
            if WINDOWED:
                visible = visible & (key[None, :] > position[:, None] - window)
            score = tl.where(visible, score, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(score, 1))
        # For a lane that has seen no key yet, any finite base avoids -inf - (-inf).
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weight, 1)
        peak = new_peak

        v = tl.load(values + value_at[:, None] + lane_v[None, :] * value_stride, mask=value_mask, other=0.0)
        v = v.to(tl.float32) if UPCAST else v.to(query.dtype)
        acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, peak, total


@triton.jit(do_not_specialize=UNSPECIALISED)
def paged_attention_kernel(
    query,
    key_cache,
    value_cache,
    out,
    lse,
    block_table,
    query_start_loc,
    seq_lens,
    scale,
    softcap,
    value_scale,
    window,
    num_rows,
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
    out_stride,
    lse_token_stride,
    lse_head_stride,
    table_stride,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERIES_PER_KEY: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PARTIAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (query tiles, KV heads, splits).

    Args:
        scale, softcap: a score in the exp2 domain is dot * scale, or softcap * tanh(dot * scale).
        window: the number of keys that a query sees at most; read where WINDOWED.
        num_tokens: T; the splits of ``out`` and of ``lse`` are so many tokens apart.
        PARTIAL: write ``out`` (splits, T, H, Dv) only where a split has keys; ``lse`` is always written.
        UPCAST: multiply in float32, for Triton's interpreter, whose dot reads bfloat16 as integers. Off on a GPU,
            whose tensor cores multiply in the query's dtype.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    # The last tiles of a row see the most keys. They start first, so that the short ones fill the GPU at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = find_row(query_start_loc, tile, num_rows, BLOCK_Q)
    row_start = tl.load(query_start_loc + row)
    queries = tl.load(query_start_loc + row + 1) - row_start
    tile_start = (tile - row - row_start // BLOCK_Q) * BLOCK_Q
    if tile_start >= queries:
        return

    seq_len = tl.load(seq_lens + row)
    lane = tl.arange(0, BLOCK_M)
    lane_d = tl.arange(0, BLOCK_D)
    lane_v = tl.arange(0, BLOCK_DV)
    index = tile_start + lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    valid = (lane < BLOCK_Q * GROUP) & (index < queries)
    token = (row_start + index).to(tl.int64)

    # The last key that each query sees; low and high are those of the tile's first and last query.
    if CAUSAL:
        # Lanes past the last query divide towards zero on a GPU, unlike in the interpreter. They are not stored.
        position = seq_len - 1 - (queries - 1 - index) // QUERIES_PER_KEY
        low = seq_len - 1 - (queries - 1 - tile_start) // QUERIES_PER_KEY
        high = seq_len - 1 - (queries - tl.minimum(tile_start + BLOCK_Q, queries)) // QUERIES_PER_KEY
    else:
        position = seq_len - 1 + tl.zeros([BLOCK_M], dtype=tl.int32)
        low = seq_len - 1
        high = seq_len - 1
    first = tl.maximum(low - window + 1, 0) if WINDOWED else 0
    last = tl.maximum(high + 1, first)
    part = tl.cdiv(tl.cdiv(last - first, tl.num_programs(2)), BLOCK_N) * BLOCK_N
    first += split * part
    last = tl.minimum(first + part, last)

    query_mask = valid[:, None] & (lane_d < HEAD_SIZE)[None, :]
    query_at = token * query_token_stride + head * query_head_stride
    q = tl.load(query + query_at[:, None] + lane_d[None, :] * query_stride, mask=query_mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    keys = key_cache + kv_head.to(tl.int64) * key_head_stride
    values = value_cache + kv_head.to(tl.int64) * value_head_stride
    page_ids = block_table + row.to(tl.int64) * table_stride
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    # Whole blocks that every query of the tile sees need no mask. With a window, every block is masked.
    unmasked = tl.maximum(tl.minimum(low + 1, last) - first, 0) // BLOCK_N * BLOCK_N
    masked_from = first if WINDOWED else first + unmasked
    # fmt: off
    if not WINDOWED:
        acc, peak, total = attend(
            acc, peak, total, q, position, first, masked_from, keys, values, page_ids,
            key_page_stride, key_slot_stride, key_stride, value_page_stride, value_slot_stride, value_stride,
            scale, softcap, window, PAGE_SIZE, HEAD_SIZE, HEAD_SIZE_V, BLOCK_N, BLOCK_D, BLOCK_DV,
            CAPPED, WINDOWED, MASKED=False, UPCAST=UPCAST,
        )
    acc, peak, total = attend(
        acc, peak, total, q, position, masked_from, last, keys, values, page_ids,
        key_page_stride, key_slot_stride, key_stride, value_page_stride, value_slot_stride, value_stride,
        scale, softcap, window, PAGE_SIZE, HEAD_SIZE, HEAD_SIZE_V, BLOCK_N, BLOCK_D, BLOCK_DV,
        CAPPED, WINDOWED, MASKED=True, UPCAST=UPCAST,
    )
    # fmt: on

    has_key = total > 0
    token += split.to(tl.int64) * num_tokens
    lse_at = token * lse_token_stride + head * lse_head_stride
    tl.store(lse + lse_at, tl.where(has_key, (peak + tl.log2(total)) * LN2, float("-inf")), mask=valid)
    acc = acc * (value_scale / tl.where(has_key, total, 1.0))[:, None]
    written = valid & has_key if PARTIAL else valid
    out_at = token * out_token_stride + head * out_head_stride
    out_mask = written[:, None] & (lane_v < HEAD_SIZE_V)[None, :]
    tl.store(out + out_at[:, None] + lane_v[None, :] * out_stride, acc.to(out.dtype.element_ty), mask=out_mask)
