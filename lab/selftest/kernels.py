"""Checks of each implementation of paged attention that runs on this machine, against float64."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from starling.attention_backends.kernels.contract import Operands
from starling.attention_backends.kernels.cpu import attention as cpu
from starling.attention_backends.kernels.cpu import fallback
from starling.attention_backends.kernels.xformers.probe import gather_facts, unavailable_reason
from starling.lab.machine import has_gpu
from starling.lab.selftest.paged import DECODE, MIXED, Attention, make_operands, measure
from starling.lab.selftest.result import Check, Result, Skip

RATIO, LSE = 1.1, 1e-5  # the bounds of tests/kernels
LARGE = 1 << 31  # elements; an int32 offset ends here
NO_GPU = "no GPU: the kernel is compiled for one"


def kernel_checks() -> list[Check]:
    """The checks; those of implementations that can't run here are skipped with the reason."""
    wide, half = (torch.float32, torch.bfloat16, torch.float16), (torch.bfloat16, torch.float16)
    return [
        Check("kernel: CPU op", functools.partial(check_cpu_op, wide)),
        Check("kernel: plain torch", functools.partial(check_kernel, fallback.paged_attention, wide, "cpu")),
        Check("kernel: Triton", functools.partial(check_triton, wide)),
        Check("kernel: xformers", functools.partial(check_xformers, half)),
        Check("kernel: CPU op, cache above 2^31 elements", check_large_cpu),
        Check("kernel: Triton, cache above 2^31 elements", check_large_triton),
    ]


def check_kernel(attention: Attention, dtypes: tuple[torch.dtype, ...], device: str) -> Result:
    """The largest ratio of errors over a mixed and a decode batch in each dtype."""
    return judge_cases(attention, [make_operands(rows, dtype) for rows in (MIXED, DECODE) for dtype in dtypes], device)


def judge_cases(attention: Attention, cases: list[Operands], device: str) -> Result:
    """Compare the ratio with ``RATIO``. The ratio is infinite where a log-sum-exp is wrong."""
    errors = [measure(attention, operands, device) for operands in cases]
    lse, ratio = max(error.lse for error in errors), max(error.ratio for error in errors)
    names = sorted({str(operands.query.dtype).removeprefix("torch.") for operands in cases})
    detail = f"{', '.join(names)}; log-sum-exp within {lse:.1e} (bound {LSE:.0e})"
    return Result(ratio if lse <= LSE else float("inf"), RATIO, "x torch SDPA's error", detail)


def cpu_op_missing() -> Skip | None:
    """Why there is no CPU op; engines use vLLM's then."""
    return None if cpu.built_op() else Skip("the C++ op can't be built: install g++ 12 or newer, or set CXX")


def check_cpu_op(dtypes: tuple[torch.dtype, ...]) -> Result | Skip:
    return cpu_op_missing() or check_kernel(cpu.paged_attention, dtypes, "cpu")


def check_triton(dtypes: tuple[torch.dtype, ...]) -> Result | Skip:
    if not has_gpu():
        return Skip(NO_GPU)
    from starling.attention_backends.kernels.triton import attention as triton

    return check_kernel(triton.paged_attention, dtypes, "cuda")


def check_xformers(dtypes: tuple[torch.dtype, ...]) -> Result | Skip:
    reason = unavailable_reason(gather_facts())
    if reason is not None:
        return Skip(reason)
    from starling.attention_backends.kernels.xformers import attention as xformers

    return check_kernel(xformers.paged_attention, dtypes, "cuda")


def in_large_cache(attention: Attention) -> Attention:
    """``attention`` on the last pages of caches whose offsets do not fit in 32 bits.

    On a CPU, the system gives the other pages no memory, because nothing writes them.
    """

    def moved(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        num_pages = large_num_pages(operands)
        offset, caches = num_pages - len(operands.keys), []
        for cache in (operands.keys, operands.values):
            caches.append(cache.new_empty(num_pages, *cache.shape[1:]))
            caches[-1][offset:] = cache
        return attention(
            replace(
                operands,
                key_cache=caches[0],
                value_cache=caches[1],
                block_table=operands.block_table + offset,
            )
        )

    return moved


def large_num_pages(operands: Operands) -> int:
    """Pages of a cache of more than 2^31 elements."""
    return LARGE // operands.keys[0].numel() + len(operands.keys)


def check_large_cpu() -> Result | Skip:
    try:
        return cpu_op_missing() or judge_cases(in_large_cache(cpu.paged_attention), [large_case()], "cpu")
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return Skip(f"the system gives no address space for the caches: {error}")


def check_large_triton() -> Result | Skip:
    if not has_gpu():
        return Skip(NO_GPU)
    from starling.attention_backends.kernels.triton import attention as triton

    case = large_case()
    needed = 2 * large_num_pages(case) * case.keys[0].numel() * case.keys.element_size() + (1 << 30)
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        return Skip(f"{free / 1e9:.1f} GB of GPU memory are free, {needed / 1e9:.1f} GB are needed")
    try:
        return judge_cases(in_large_cache(triton.paged_attention), [case], "cuda")
    finally:
        torch.cuda.empty_cache()  # for the engines of later checks


def large_case() -> Operands:
    return make_operands(MIXED, torch.bfloat16)
