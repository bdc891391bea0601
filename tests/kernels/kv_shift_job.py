"""Run in a process with the shim of tests/v2_shim, which makes Triton usable without a GPU.

interpret   runs the kernels as Python, and compares them to the torch path (TRITON_INTERPRET=1)
wide        runs the kernels as Python on rows and pages that lie far apart (TRITON_INTERPRET=1)
compile     compiles the kernels for NVIDIA GPUs to machine code (without TRITON_INTERPRET)
steps       counts the kernels that steps of any size compile (without TRITON_INTERPRET)
"""

from __future__ import annotations

import sys

import torch

from starling.attention_backends.kv_shift import kernel
from starling.attention_backends.kv_shift.shift import NO_ROW, NO_SLOT, ShiftMetadata, shift

HEADS, PAGE_SIZE, NUM_PAGES = 3, 4, 9


def interpret() -> None:
    """Two running requests, one whose predecessor is stored in this step, a new one, and padding, in rows of a QKV."""
    for dtype, size in ((torch.float32, 8), (torch.bfloat16, 5)):
        torch.manual_seed(0)
        width = HEADS * size
        qkv = torch.randn(11, 4 * width).to(dtype)
        key, value = qkv[:, 2 * width : 3 * width], qkv[:, 3 * width :]
        weights = torch.rand(2, HEADS, 2) * 2 - 0.5
        states = [torch.randn(NUM_PAGES, PAGE_SIZE, HEADS, 2 * size).to(dtype).transpose(1, 2)]
        states.append(states[0].clone(memory_format=torch.preserve_format))
        metadata = ShiftMetadata(
            torch.tensor([0, 3, 7, 8, NO_ROW]).int(),
            torch.tensor([6, 21, 9, NO_SLOT, NO_SLOT]),
            torch.tensor([7, 16, 17, 22, 8, 9, 10, 10, 28, -1]),
        )
        want = shift(key, value, *weights, states[0], metadata)
        got = key.new_empty(key.shape), value.new_empty(value.shape)
        kernel.shift_kernel(key, value, *weights, states[1], metadata, *got)
        # The torch path writes padding to page 0, which no request has.
        torch.testing.assert_close(states[1][1:], states[0][1:], rtol=0, atol=0)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # the interpreter truncates bfloat16
        for mine, its in zip(got, want, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance)


def interpret_wide() -> None:
    """Rows of K, V and the outputs, and pages of the state, at offsets above 2^31 elements."""
    from tests.kernels.sparse import keep_arguments_in_place, spread

    keep_arguments_in_place()
    torch.manual_seed(0)
    size = 4
    key, value = torch.randn(2, 3, HEADS * size)
    weights = torch.rand(2, HEADS, 2)
    state = torch.randn(3, HEADS, PAGE_SIZE, 2 * size)
    wide_state = spread(state)
    last_page = 2 * PAGE_SIZE
    metadata = ShiftMetadata(
        torch.tensor([0, 2]).int(), torch.tensor([last_page, NO_SLOT]), torch.arange(last_page + 1, last_page + 4)
    )
    want = shift(key, value, *weights, state, metadata)
    got = spread(torch.zeros_like(key)), spread(torch.zeros_like(value))
    kernel.shift_kernel(spread(key), spread(value), *weights, wide_state, metadata, *got)
    torch.testing.assert_close(wide_state[1:], state[1:], rtol=0, atol=0)
    for mine, its in zip(got, want, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)


def compile_kernels() -> None:
    """A head size that is no power of 2, and the largest that vLLM's backends serve."""
    from tests.kernels.machine_code import CAPABILITIES, check_resources

    for capability in CAPABILITIES:
        for dtype, size, block, aligned in (("bf16", 96, 128, True), ("fp32", 256, 256, False)):
            types = {
                **dict.fromkeys(("key", "value", "out_key", "out_value", "state"), f"*{dtype}"),
                **dict.fromkeys(("key_weights", "value_weights"), "*fp32"),
                **{"slots": "*i64", "first_slots": "*i64", "first_rows": "*i32"},
            }
            for function in (kernel._rows_kernel, kernel._first_rows_kernel):
                check_resources(function, types, {"SIZE": size, "BLOCK": block}, capability, aligned)


def count_kernels_of_steps() -> None:
    """Steps of 1 to 40 tokens and requests, padded or not: one kernel of each kind takes them all."""
    from tests.kernels.compiles import count_compiles

    compiled = count_compiles()
    state, weights = torch.randn(NUM_PAGES, HEADS, PAGE_SIZE, 32), torch.rand(2, HEADS, 2)
    for rows, requests, slots in ((1, 1, 1), (2, 1, 2), (16, 16, 16), (17, 5, 16), (40, 3, 32), (33, 33, 1)):
        key, value = torch.randn(rows, 4 * HEADS * 16).chunk(4, 1)[2:]
        first_rows, first_slots = torch.zeros(41, dtype=torch.int32), torch.zeros(41, dtype=torch.int64)
        # Views that begin anywhere, as of a buffer that has more.
        metadata = ShiftMetadata(first_rows[1 : 1 + requests], first_slots[1 : 1 + requests], torch.zeros(slots).long())
        kernel.shift_kernel(key, value, *weights, state, metadata, *torch.empty(2, *key.shape))
    assert compiled == {"_rows_kernel": 1, "_first_rows_kernel": 1}, compiled


def main() -> None:
    jobs = {"interpret": interpret, "wide": interpret_wide, "compile": compile_kernels, "steps": count_kernels_of_steps}
    jobs[sys.argv[1]]()
