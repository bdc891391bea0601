"""The shift as two Triton launches, for GPUs. The tests compare the kernels with the torch version in shift.py.

The first launch mixes every row with the row above it and stores the raw rows in the state. The second launch corrects
the first row of each request, whose predecessor is in the state. Two launches are needed because another request of
the same step may store that predecessor, and the programs of one launch are not ordered. The grids depend only on the
numbers of rows and requests, so CUDA graphs of decode batches can record the launches. The kernels are not specialised
on these numbers: Triton would compile further kernels when they change.
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

from starling.attention_backends.kv_shift.shift import ShiftMetadata


@triton.jit
def _store_mixed(out, previous, current, weights, head, mask):
    """Mix in float32, store in the dtype of ``out``."""
    previous_weight, current_weight = tl.load(weights + 2 * head), tl.load(weights + 2 * head + 1)
    mixed = previous.to(tl.float32) * previous_weight + current.to(tl.float32) * current_weight
    tl.store(out, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("slots", "num_slots"))
def _rows_kernel(
    key, value, out_key, out_value, key_weights, value_weights, state,
    slots, num_slots,
    key_stride, value_stride, out_stride, page_stride, head_stride, token_stride, page_size,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and KV head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, BLOCK)
    mask = inner < SIZE
    column = head * SIZE + inner
    above_mask = mask & (row > 0)
    current_key = tl.load(key + row * key_stride + column, mask=mask, other=0.0)
    current_value = tl.load(value + row * value_stride + column, mask=mask, other=0.0)
    previous_key = tl.load(key + (row - 1) * key_stride + column, mask=above_mask, other=0.0)
    previous_value = tl.load(value + (row - 1) * value_stride + column, mask=above_mask, other=0.0)
    slot = tl.load(slots + row, mask=row < num_slots, other=-1)
    at = state + (slot // page_size) * page_stride + head * head_stride + (slot % page_size) * token_stride + inner
    state_mask = mask & (slot >= 0)
    tl.store(at, current_key, mask=state_mask)
    tl.store(at + SIZE, current_value, mask=state_mask)
    out = row * out_stride + column
    _store_mixed(out_key + out, previous_key, current_key, key_weights, head, mask)
    _store_mixed(out_value + out, previous_value, current_value, value_weights, head, mask)


@triton.jit(do_not_specialize=("first_rows", "first_slots", "num_rows"))
def _first_rows_kernel(
    key, value, out_key, out_value, key_weights, value_weights, state,
    first_rows, first_slots, num_rows,
    key_stride, value_stride, out_stride, page_stride, head_stride, token_stride, page_size,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per request and KV head. A program whose request has no row does nothing."""
    request, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(first_rows + request).to(tl.int64)
    slot = tl.load(first_slots + request)
    inner = tl.arange(0, BLOCK)
    mask = (inner < SIZE) & (row < num_rows)
    column = head * SIZE + inner
    at = state + (slot // page_size) * page_stride + head * head_stride + (slot % page_size) * token_stride + inner
    state_mask = mask & (slot >= 0)
    previous_key = tl.load(at, mask=state_mask, other=0.0)
    previous_value = tl.load(at + SIZE, mask=state_mask, other=0.0)
    current_key = tl.load(key + row * key_stride + column, mask=mask, other=0.0)
    current_value = tl.load(value + row * value_stride + column, mask=mask, other=0.0)
    out = row * out_stride + column
    _store_mixed(out_key + out, previous_key, current_key, key_weights, head, mask)
    _store_mixed(out_value + out, previous_value, current_value, value_weights, head, mask)


def shift_kernel(
    key: torch.Tensor,
    value: torch.Tensor,
    key_weights: torch.Tensor,
    value_weights: torch.Tensor,
    state: torch.Tensor,
    metadata: ShiftMetadata,
    out_key: torch.Tensor,
    out_value: torch.Tensor,
) -> None:
    """As ``shift.shift``, for a step with requests; stores the shifted K and V in ``out_key`` and ``out_value``.

    The outputs are contiguous and have the shape of ``key``. The rows of ``key`` and ``value`` may have any stride, the
    elements of a row are contiguous. The weights are float32 and contiguous. The last dimension of the state is
    contiguous.
    """
    rows, heads = key.shape[0], key_weights.shape[0]
    size = key.shape[1] // heads
    tensors = (key, value, out_key, out_value, key_weights, value_weights, state)
    strides = (key.stride(0), value.stride(0), out_key.stride(0), *state.stride()[:3], state.shape[2])
    block = triton.next_power_of_2(size)
    _rows_kernel[(rows, heads)](*tensors, metadata.slots, len(metadata.slots), *strides, SIZE=size, BLOCK=block)
    requests = len(metadata.first_rows)
    _first_rows_kernel[(requests, heads)](
        *tensors, metadata.first_rows, metadata.first_slots, rows, *strides, SIZE=size, BLOCK=block
    )
