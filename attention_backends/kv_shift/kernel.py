"""The shift as two Triton launches, for GPUs; shift.py is the same in torch, and what this is tested against.

One launch mixes every row with the row above it and stores the raw rows; the next mends the first row of each
request, whose predecessor is in the state. Two, because that predecessor may be a row that another request stores in
this very step, and programs of one launch do not wait for one another. Grids depend on the numbers of rows and
requests alone, so decode graphs can hold them.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

from attention_backends.kv_shift.shift import ShiftMetadata


@triton.jit
def _store_mixed(out, before, now, weights, head, mask):
    """Mix in float32, store in the dtype of ``out``."""
    mixed = before.to(tl.float32) * tl.load(weights + 2 * head) + now.to(tl.float32) * tl.load(weights + 2 * head + 1)
    tl.store(out, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rows_kernel(
    key,
    value,
    out_key,
    out_value,
    key_weights,
    value_weights,
    state,
    slots,
    num_slots,
    key_stride,
    value_stride,
    out_stride,
    page_stride,
    head_stride,
    token_stride,
    page,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and KV head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, BLOCK)
    here = inner < SIZE
    column = head * SIZE + inner
    has_above = here & (row > 0)
    now_key = tl.load(key + row * key_stride + column, mask=here, other=0.0)
    now_value = tl.load(value + row * value_stride + column, mask=here, other=0.0)
    above_key = tl.load(key + (row - 1) * key_stride + column, mask=has_above, other=0.0)
    above_value = tl.load(value + (row - 1) * value_stride + column, mask=has_above, other=0.0)
    slot = tl.load(slots + row, mask=row < num_slots, other=-1)
    at = state + (slot // page) * page_stride + head * head_stride + (slot % page) * token_stride + inner
    stored = here & (slot >= 0)
    tl.store(at, now_key, mask=stored)
    tl.store(at + SIZE, now_value, mask=stored)
    out = row * out_stride + column
    _store_mixed(out_key + out, above_key, now_key, key_weights, head, here)
    _store_mixed(out_value + out, above_value, now_value, value_weights, head, here)


@triton.jit
def _first_rows_kernel(
    key,
    value,
    out_key,
    out_value,
    key_weights,
    value_weights,
    state,
    first_rows,
    first_slots,
    num_rows,
    key_stride,
    value_stride,
    out_stride,
    page_stride,
    head_stride,
    token_stride,
    page,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a request and KV head; none where the request has no row."""
    request, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(first_rows + request).to(tl.int64)
    slot = tl.load(first_slots + request)
    inner = tl.arange(0, BLOCK)
    here = (inner < SIZE) & (row < num_rows)
    column = head * SIZE + inner
    at = state + (slot // page) * page_stride + head * head_stride + (slot % page) * token_stride + inner
    known = here & (slot >= 0)
    before_key = tl.load(at, mask=known, other=0.0)
    before_value = tl.load(at + SIZE, mask=known, other=0.0)
    now_key = tl.load(key + row * key_stride + column, mask=here, other=0.0)
    now_value = tl.load(value + row * value_stride + column, mask=here, other=0.0)
    out = row * out_stride + column
    _store_mixed(out_key + out, before_key, now_key, key_weights, head, here)
    _store_mixed(out_value + out, before_value, now_value, value_weights, head, here)


def shift_kernel(
    key: torch.Tensor,
    value: torch.Tensor,
    key_weights: torch.Tensor,
    value_weights: torch.Tensor,
    state: torch.Tensor,
    metadata: ShiftMetadata,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As shift.shift, for a step with requests. Rows of key and value may lie apart, their elements may not.

    Weights are float32 and contiguous; the state's last dimension is contiguous.
    """
    rows, heads = key.shape[0], key_weights.shape[0]
    size = key.shape[1] // heads
    out_key, out_value = key.new_empty(key.shape), value.new_empty(value.shape)
    tensors = (key, value, out_key, out_value, key_weights, value_weights, state)
    strides = (key.stride(0), value.stride(0), out_key.stride(0), *state.stride()[:3], state.shape[2])
    block = triton.next_power_of_2(size)
    _rows_kernel[(rows, heads)](*tensors, metadata.slots, len(metadata.slots), *strides, SIZE=size, BLOCK=block)
    requests = len(metadata.first_rows)
    _first_rows_kernel[(requests, heads)](
        *tensors, metadata.first_rows, metadata.first_slots, rows, *strides, SIZE=size, BLOCK=block
    )
    return out_key, out_value
