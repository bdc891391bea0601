"""The Triton kernels of a decode step, in which every request has one token, for GPUs. decode.py launches them.

They compute chunks, states and places from the length of each request, which lies on the device, and read nothing that
the host planned. So a CUDA graph can record them. A request whose slot is negative is no request: it pads a CUDA graph,
or belongs to a dummy run of vLLM's, which leaves the block tables of real requests in place. Nothing is stored for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from starling.attention_backends.attamba.chunks import PAGE_ROWS

ROWS = tl.constexpr(PAGE_ROWS)  # of K|V in a page; the row behind them is that of token 0
UNSPECIALISED = (
    *("seq_lens", "slots", "table", "state_table", "window_table"),
    *("offset", "table_stride", "state_table_stride", "window_table_stride"),
)
"""Arguments that change with the step or the layer, and that no wide load depends on: one compiled kernel takes every
value (kernels/triton/attend.py).
"""


@triton.jit
def _last_position(seq_lens, slots, request):
    """Return the position of the request's token, or -1 if there is no request."""
    return tl.where(tl.load(slots + request) < 0, -1, tl.load(seq_lens + request) - 1)


@triton.jit
def _convolve(
    pages, table, start, row, column, column_mask, weight, page_stride, row_stride,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, PAGE_TOKENS: tl.constexpr,
):  # fmt: skip
    """SiLU of the causal convolution at (row, column) of a chunk, float32; 0 outside of the mask.

    Args:
        start: position of the chunk's row 0. Rows below 0 count as 0.
        weight: (TAPS, CHANNELS).
    """
    total = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for back in range(TAPS):
        in_chunk = row >= back
        position = start + row - back
        page = tl.load(table + position // PAGE_TOKENS, mask=in_chunk, other=0).to(tl.int64)
        at = page * page_stride + position % PAGE_TOKENS * row_stride
        mask = in_chunk[:, None] & column_mask[None, :]
        values = tl.load(pages + at[:, None] + column[None, :], mask=mask, other=0.0)
        tap = tl.load(weight + (TAPS - 1 - back) * CHANNELS + column, mask=column_mask, other=0.0)
        total += values.to(tl.float32) * tap[None, :]
    return total / (1 + tl.exp(-total))


@triton.jit(do_not_specialize=UNSPECIALISED)
def rows_kernel(
    projected, pages, table, seq_lens, slots, token_stride, page_stride, row_stride, table_stride,
    INNER: tl.constexpr, WIDTH: tl.constexpr, PAGE_TOKENS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Grid (requests, mixers). Stores the tokens' rows, of WIDTH values a mixer.

    A launch of its own, before that of the scan: a chunk can begin in a page of another request's that this step fills,
    as vLLM's prefix cache hits pages that are only scheduled to be filled. Programs of one launch are not ordered.
    """
    request, mixer = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = _last_position(seq_lens, slots, request)
    if position < 0:
        return
    value = tl.arange(0, BLOCK_W)
    page = tl.load(table + request * table_stride + position // PAGE_TOKENS).to(tl.int64)
    at = page * page_stride + position % PAGE_TOKENS * row_stride + mixer * WIDTH
    row = projected + request * token_stride + mixer * (INNER + WIDTH) + INNER
    tl.store(pages + at + value, tl.load(row + value, mask=value < WIDTH), mask=value < WIDTH)


@triton.jit(do_not_specialize=UNSPECIALISED)
def mix_kernel(
    projected, pages, table, seq_lens, slots, conv, a_log, skip, norm, out,
    chunk_size, offset, eps, token_stride, page_stride, row_stride, table_stride,
    HEADS: tl.constexpr, INNER: tl.constexpr, STATE: tl.constexpr, TAPS: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (requests, mixers). Scans the chunk of the request's token from the token's row back to row 0.

    So the decay between a row and the token is a sum that begins at 0. ``out`` is (mixers, requests, INNER). The blocks
    are rows of a step of the scan, and powers of 2 for INNER and STATE.
    """
    CHANNELS: tl.constexpr = INNER + 2 * STATE
    WIDTH: tl.constexpr = CHANNELS + HEADS
    request, mixer = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = _last_position(seq_lens, slots, request)
    if position < 0:
        return
    table += request * table_stride
    pages += mixer * WIDTH
    conv += mixer * TAPS * CHANNELS
    projected += request * token_stride + mixer * (INNER + WIDTH)
    column, state = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_S)
    inner, in_state = column < INNER, state < STATE
    head = mixer * HEADS + tl.minimum(column, INNER - 1) // (INNER // HEADS)

    first = tl.maximum(1, (position + offset) // chunk_size * chunk_size - offset)
    start = tl.where(position == 0, 0, first)
    last = position - start
    own = last + tl.zeros([1], dtype=tl.int32)
    # fmt: off
    c = _convolve(
        pages, table, start, own, INNER + STATE + state, in_state, conv, page_stride, row_stride,
        CHANNELS, TAPS, PAGE_TOKENS,
    )
    y = tl.load(skip + head).to(tl.float32) * tl.sum(_convolve(
        pages, table, start, own, column, inner, conv, page_stride, row_stride, CHANNELS, TAPS, PAGE_TOKENS,
    ), 0)
    rate = -tl.exp(tl.load(a_log + head).to(tl.float32))
    decay = tl.zeros([BLOCK_I], dtype=tl.float32)  # of the rows after those of the loop's step
    for back in range(0, last + 1, BLOCK_R):
        row = last - back - tl.arange(0, BLOCK_R)
        in_chunk = row >= 0
        b = _convolve(
            pages, table, start, row, INNER + state, in_state, conv, page_stride, row_stride,
            CHANNELS, TAPS, PAGE_TOKENS,
        )
        u = _convolve(
            pages, table, start, row, column, inner, conv, page_stride, row_stride, CHANNELS, TAPS, PAGE_TOKENS,
        )
        # fmt: on
        score = tl.sum(b * c, 1)
        page_ids = tl.load(table + (start + row) // PAGE_TOKENS, mask=in_chunk, other=0).to(tl.int64)
        rows = page_ids * page_stride + (start + row) % PAGE_TOKENS * row_stride + CHANNELS - mixer * HEADS
        dt = tl.load(pages + rows[:, None] + head[None, :], mask=in_chunk[:, None], other=0.0).to(tl.float32)
        dt = tl.where(in_chunk[:, None], tl.maximum(dt, 0.0) + tl.log(1 + tl.exp(-tl.abs(dt))), 0.0)  # softplus
        step = dt * rate[None, :]
        remains = tl.exp(decay[None, :] + tl.cumsum(step, 0) - step)
        y += tl.sum(remains * score[:, None] * dt * u, 0)
        decay += tl.sum(step, 0)

    gate = tl.load(projected + column, mask=inner, other=0.0).to(tl.float32)
    y = tl.where(inner, y * gate / (1 + tl.exp(-gate)), 0.0)
    y *= tl.rsqrt(tl.sum(y * y, 0) / INNER + eps)
    y *= tl.load(norm + mixer * INNER + column, mask=inner, other=0.0)
    out += (mixer * tl.num_programs(0).to(tl.int64) + request) * INNER
    tl.store(out + column, y.to(out.dtype.element_ty), mask=inner)


@triton.jit
def _load_pairs(at, mask):
    """Load the even and the odd values of pairs, in float32."""
    even, odd = tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _rotate(even, odd, cos, sin):
    """Apply the rotary embedding to the pairs (even, odd)."""
    return even * cos - odd * sin, odd * cos + even * sin


@triton.jit
def _store_row(keys, values, page, slot, head, lane, mask, key_even, key_odd, value_even, value_odd,
               page_stride, slot_stride, head_stride):  # fmt: skip
    """Store the pairs of one head's key and value."""
    at = page * page_stride + slot * slot_stride + head * head_stride + 2 * lane
    tl.store(keys + at, key_even.to(keys.dtype.element_ty), mask=mask)
    tl.store(keys + at + 1, key_odd.to(keys.dtype.element_ty), mask=mask)
    tl.store(values + at, value_even.to(values.dtype.element_ty), mask=mask)
    tl.store(values + at + 1, value_odd.to(values.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def store_kernel(
    query, mixed_key, mixed_value, own, seq_lens, slots, cos, sin, rotated, num_states,
    state_keys, state_values, state_table, window_keys, window_values, window_table,
    chunk_size, offset, leading, query_stride, mixed_stride, own_stride,
    state_page_stride, window_page_stride, slot_stride, head_stride, state_table_stride, window_table_stride,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (requests, heads). Stores K and V of the token, and what decode.py's attention reads.

    K is rotated and goes to the window, and to the states where the token ends a chunk. ``rotated`` (requests, heads,
    HEAD_SIZE) gets the rotated query, ``num_states`` (requests,) the states that the token sees.
    """
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = _last_position(seq_lens, slots, request)
    before_window = tl.maximum(0, position - leading + offset)
    tl.store(num_states + request, before_window // chunk_size)
    if position < 0:
        return
    HALF: tl.constexpr = HEAD_SIZE // 2
    lane = tl.arange(0, BLOCK_D)
    mask = lane < HALF
    column = head * HEAD_SIZE + 2 * lane
    angle = position.to(tl.int64) * HALF + lane
    cosine, sine = tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)

    even, odd = _rotate(*_load_pairs(query + request * query_stride + column, mask), cosine, sine)
    rotated += (request * tl.num_programs(1) + head) * HEAD_SIZE + 2 * lane
    tl.store(rotated, even.to(rotated.dtype.element_ty), mask=mask)
    tl.store(rotated + 1, odd.to(rotated.dtype.element_ty), mask=mask)

    x_even, x_odd = _load_pairs(own + request * own_stride + column, mask)
    key_even, key_odd = _load_pairs(mixed_key + request * mixed_stride + column, mask)
    key_even, key_odd = _rotate(x_even + key_even, x_odd + key_odd, cosine, sine)
    value_even, value_odd = _load_pairs(mixed_value + request * mixed_stride + column, mask)
    value_even, value_odd = x_even + value_even, x_odd + value_odd

    # fmt: off
    page = tl.load(window_table + request * window_table_stride + position // ROWS).to(tl.int64)
    _store_row(window_keys, window_values, page, position % ROWS, head, lane, mask, key_even, key_odd,
               value_even, value_odd, window_page_stride, slot_stride, head_stride)
    is_boundary = (position + 1 + offset) % chunk_size == 0
    if is_boundary | (position == 0):
        state = position // chunk_size
        slot = tl.where(is_boundary, state % ROWS, ROWS)
        page = tl.load(state_table + request * state_table_stride + state // ROWS).to(tl.int64)
        _store_row(state_keys, state_values, page, slot, head, lane, mask, key_even, key_odd,
                   value_even, value_odd, state_page_stride, slot_stride, head_stride)
    # fmt: on


@triton.jit(do_not_specialize=UNSPECIALISED)
def join_kernel(
    rotated, states_out, states_lse, window_out, window_lse, seq_lens, slots, state_keys, state_values, state_table,
    out, chunk_size, offset, leading, scale, page_stride, slot_stride, head_stride, state_table_stride, out_stride,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (requests, heads). Merges attention to states and window with that to the state of token 0.

    The parts are (requests, heads, HEAD_SIZE), their log-sum-exps (requests, heads), ``out`` (requests, heads x
    HEAD_SIZE).
    """
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = request * tl.num_programs(1) + head
    lane = tl.arange(0, BLOCK_D)
    mask = lane < HEAD_SIZE
    position = _last_position(seq_lens, slots, request)
    sees_token_0 = (position > leading) & (offset != chunk_size - 1)

    page = tl.load(state_table + request * state_table_stride).to(tl.int64)
    at = page * page_stride + ROWS * slot_stride + head * head_stride + lane
    is_read = mask & sees_token_0
    query = tl.load(rotated + row * HEAD_SIZE + lane, mask=is_read, other=0.0).to(tl.float32)
    key = tl.load(state_keys + at, mask=is_read, other=0.0).to(tl.float32)
    value = tl.load(state_values + at, mask=is_read, other=0.0).to(tl.float32)
    token_0_lse = tl.where(sees_token_0, tl.sum(query * key, 0) * scale, float("-inf"))

    lse, other_lse = tl.load(window_lse + row), tl.load(states_lse + row)
    peak = tl.maximum(tl.maximum(lse, other_lse), token_0_lse)
    weight, other_weight, token_0_weight = tl.exp(lse - peak), tl.exp(other_lse - peak), tl.exp(token_0_lse - peak)
    part = tl.load(window_out + row * HEAD_SIZE + lane, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(states_out + row * HEAD_SIZE + lane, mask=mask, other=0.0).to(tl.float32)
    total = weight + other_weight + token_0_weight
    merged = (weight * part + other_weight * other + token_0_weight * value) / total
    # The attention wrote nothing for a request that pads a CUDA graph.
    merged = tl.where(position < 0, 0.0, merged)
    out += request * out_stride + head * HEAD_SIZE + lane
    tl.store(out, merged.to(out.dtype.element_ty), mask=mask)
