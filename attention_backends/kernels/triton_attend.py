"""The Triton kernel under prefill and decode: tiles of queries against the paged keys of their row.

A program takes a tile of BLOCK_Q queries of one row with the GROUP heads that share a KV head, BLOCK_M
lanes in all, and walks over the keys its queries may see, or over its share of them where keys are split.
The softmax is online and in the exp2 domain (arXiv 2307.08691, section 3.1).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_row(query_start_loc, tile, num_rows, BLOCK_Q: tl.constexpr):
    """The row a query tile belongs to. Row r owns the tiles from query_start_loc[r] // BLOCK_Q + r on.

    That leaves each row room for its tiles wherever it starts, so the host can size the grid without
    reading query lengths back from the device.
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
    """By the exponential of -2 |x|, which can't overflow."""
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
    pages,
    key_page_stride,
    key_slot_stride,
    key_stride,
    value_page_stride,
    value_slot_stride,
    value_stride,
    scale,
    softcap,
    window,
    PAGE: tl.constexpr,
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
    """Take the keys first <= n < last into the running (acc, peak, total) of a tile.

    Keys outside that range are never read. Without MASKED all of them must be visible to all lanes, and
    their number a multiple of BLOCK_N.
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
            page = tl.load(pages + key // PAGE, mask=key < last, other=0).to(tl.int64)
        else:
            page = tl.load(pages + key // PAGE).to(tl.int64)
        slot = key % PAGE
        key_at = page * key_page_stride + slot * key_slot_stride
        value_at = page * value_page_stride + slot * value_slot_stride

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
        # A lane that has seen no key yet: any finite number keeps -inf - (-inf) out.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weight, 1)
        peak = new_peak

        v = tl.load(values + value_at[:, None] + lane_v[None, :] * value_stride, mask=value_mask, other=0.0)
        v = v.to(tl.float32) if UPCAST else v.to(query.dtype)
        acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, peak, total


@triton.jit
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
    out_split_stride,
    out_token_stride,
    out_head_stride,
    out_stride,
    lse_split_stride,
    lse_token_stride,
    lse_head_stride,
    table_stride,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
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
        scale, softcap: such that a score in the exp2 domain is dot * scale, or softcap * tanh(dot * scale).
        window: keys a query sees at most; read where WINDOWED.
        PARTIAL: ``out`` (splits, T, H, Dv) is written only where a split has keys; ``lse`` always is.
        UPCAST: multiply in float32, for Triton's interpreter, whose dot takes bfloat16 for integers. On a
            GPU, off: the tensor cores take the query's dtype.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    # The last tiles of a row see the most keys: started first, they leave the shortest tail.
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

    # The last key a query sees, and that of the tile's first and last query.
    if CAUSAL:
        # Lanes past the last query divide towards zero, unlike Python under the interpreter; they are not stored.
        position = seq_len - 1 - (queries - 1 - index) // QUERIES_PER_KEY
        low = seq_len - 1 - (queries - 1 - tile_start) // QUERIES_PER_KEY
        high = seq_len - 1 - (queries - tl.minimum(tile_start + BLOCK_Q, queries)) // QUERIES_PER_KEY
    else:
        position = seq_len - 1 + tl.zeros([BLOCK_M], dtype=tl.int32)
        low = seq_len - 1
        high = seq_len - 1
    first = tl.maximum(low - window + 1, 0) if WINDOWED else 0
    last = tl.maximum(high + 1, first)
    share = tl.cdiv(tl.cdiv(last - first, tl.num_programs(2)), BLOCK_N) * BLOCK_N
    first += split * share
    last = tl.minimum(first + share, last)

    query_mask = valid[:, None] & (lane_d < HEAD_SIZE)[None, :]
    query_at = token * query_token_stride + head * query_head_stride
    q = tl.load(query + query_at[:, None] + lane_d[None, :] * query_stride, mask=query_mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    keys = key_cache + kv_head.to(tl.int64) * key_head_stride
    values = value_cache + kv_head.to(tl.int64) * value_head_stride
    pages = block_table + row.to(tl.int64) * table_stride
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    # Whole blocks that every query of the tile sees need no mask; with a window, none is taken for such.
    shared = tl.maximum(tl.minimum(low + 1, last) - first, 0) // BLOCK_N * BLOCK_N
    masked_from = first if WINDOWED else first + shared
    # fmt: off
    if not WINDOWED:
        acc, peak, total = attend(
            acc, peak, total, q, position, first, masked_from, keys, values, pages,
            key_page_stride, key_slot_stride, key_stride, value_page_stride, value_slot_stride, value_stride,
            scale, softcap, window, PAGE, HEAD_SIZE, HEAD_SIZE_V, BLOCK_N, BLOCK_D, BLOCK_DV,
            CAPPED, WINDOWED, MASKED=False, UPCAST=UPCAST,
        )
    acc, peak, total = attend(
        acc, peak, total, q, position, masked_from, last, keys, values, pages,
        key_page_stride, key_slot_stride, key_stride, value_page_stride, value_slot_stride, value_stride,
        scale, softcap, window, PAGE, HEAD_SIZE, HEAD_SIZE_V, BLOCK_N, BLOCK_D, BLOCK_DV,
        CAPPED, WINDOWED, MASKED=True, UPCAST=UPCAST,
    )
    # fmt: on

    seen = total > 0
    split = split.to(tl.int64)
    lse_at = split * lse_split_stride + token * lse_token_stride + head * lse_head_stride
    tl.store(lse + lse_at, tl.where(seen, (peak + tl.log2(total)) * LN2, float("-inf")), mask=valid)
    acc = acc * (value_scale / tl.where(seen, total, 1.0))[:, None]
    written = valid & seen if PARTIAL else valid
    out_at = split * out_split_stride + token * out_token_stride + head * out_head_stride
    out_mask = written[:, None] & (lane_v < HEAD_SIZE_V)[None, :]
    tl.store(out + out_at[:, None] + lane_v[None, :] * out_stride, acc.to(out.dtype.element_ty), mask=out_mask)
