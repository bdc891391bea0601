"""Run in a process with the shim of tests/v2_shim, which makes Triton usable without a GPU.

interpret   runs the kernels as Python, and compares them to the torch path (TRITON_INTERPRET=1)
compile     compiles the kernels for an NVIDIA GPU to machine code (without TRITON_INTERPRET)
"""

from __future__ import annotations

import sys

import torch
import triton

from attention_backends.kv_shift import kernel
from attention_backends.kv_shift.shift import NO_ROW, NO_SLOT, ShiftMetadata, shift

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
        got = kernel.shift_kernel(key, value, *weights, states[1], metadata)
        # The torch path writes padding to page 0, which no request has.
        torch.testing.assert_close(states[1][1:], states[0][1:], rtol=0, atol=0)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # the interpreter truncates bfloat16
        for mine, its in zip(got, want, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance)


def compile_kernels() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.backends.backends.pop("cpu")  # the shim's backend, which has no compiler
    pointers = {
        **dict.fromkeys(("key", "value", "out_key", "out_value", "state"), "*bf16"),
        **dict.fromkeys(("key_weights", "value_weights"), "*fp32"),
        **{"slots": "*i64", "first_slots": "*i64", "first_rows": "*i32"},
    }
    for function in (kernel._rows_kernel, kernel._first_rows_kernel):
        constants = {"SIZE": 96, "BLOCK": 128}
        names = [name for name in function.arg_names if name not in constants]
        signature = {name: pointers.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr")
        made = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert made.asm["cubin"]


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_kernels}[sys.argv[1]]()
