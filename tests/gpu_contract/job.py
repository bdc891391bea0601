"""Run in a process of its own: holds one backend, wrapped, against the explicit mask, and prints a JSON line.

The argument is a key of ``JOBS``. The Triton kernels run under the interpreter, so the process needs the environment of
tests/parity/harness.py's ``v2_env``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

from tests.gpu_contract.cuda_platform import use_cuda_platform

os.environ["VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE"] = "1024"
PLATFORM = use_cuda_platform()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402

from starling.attention_backends.kernels import contract  # noqa: E402
from starling.attention_backends.star import range_attention  # noqa: E402
from starling.attention_backends.star.document_step import DocumentStep  # noqa: E402
from tests.gpu_contract import kernels  # noqa: E402
from tests.gpu_contract.cases import PAGES, cases, expected, gathers_pages, numbers, rows_of  # noqa: E402
from tests.gpu_contract.engine import run_case  # noqa: E402
from tests.gpu_contract.ranges import attend_in_ranges  # noqa: E402
from tests.kernels.determinism import OnlyDeterministic  # noqa: E402

BOUND = 1e-6


def by_parts(drawn: dict[str, Any]) -> bool:
    """Whether the engine of cases that are drawn so is made for documents or dense heads."""
    return bool(drawn.get("own_positions") or drawn.get("dense_heads"))


class Tally:
    """Counts of the cases of a job, and their worst difference.

    Args:
        by_parts: whether the engine is made for documents or dense heads.
    """

    def __init__(self, by_parts: bool = False) -> None:
        self.by_parts = by_parts
        self.worst = 0.0
        self.counts: Counter[str] = Counter()
        self.more: Callable[[str], None] = lambda fact: None

    def add(self, case: Any, base: Any, fp8_query: bool) -> None:
        drawn = numbers(case, case.fp8 and fp8_query)
        impl = base.get_impl_cls()
        with mock.patch.object(impl, "forward", autospec=True, side_effect=impl.forward) as forward:
            outputs, rows = run_case(case, base, drawn, self.by_parts)
        calls = forward.call_count - len(outputs) + 1  # on the full layer
        if rows is None or rows.rerotated is None:
            wanted = case.num_runs if rows is not None else 1
            assert calls == wanted, f"{calls} calls for {wanted} runs of heads"
        else:
            others = rows.query_lens.sum() - rows.query_lens[np.unique(rows.rerotated.row)].sum()
            assert calls == (others > 0), f"{calls} calls of vLLM's for {others} tokens without such blocks"
        for out, window in outputs:
            want = expected(case, drawn, window)
            assert not out.isnan().any(), f"{int(out.isnan().any((1, 2)).sum())} tokens have no output"
            difference = (out.double() - want).abs().max().item()
            # fp8 values reach 4 times those of float32 here.
            assert difference <= BOUND * max(1.0, want.abs().max().item()), f"the worst difference is {difference:.1e}"
            self.worst = max(self.worst, difference / max(1.0, want.abs().max().item()))
        self.counts.update({"cases": 1} | facts_of(case, rows))


def facts_of(case: Any, rows: Any) -> dict[str, bool]:
    """What is true of a case whose virtual rows are these."""
    has_rows = rows is not None
    rerotated = has_rows and rows.rerotated is not None
    in_calls = has_rows and not rerotated and case.num_runs > 1
    return {
        "star_steps": has_rows,
        "gathered": has_rows and len(rows.gathered) > 0,
        "one_token_rows": has_rows and bool(((rows.query_lens == 1) & rows.star).any()),
        "windowed": case.window is not None,
        "fp8": case.fp8,
        "sinks": case.sinks,
        "padded": case.padding > 0,
        "rerotated": rerotated,
        "rerotated_beside_others": rerotated and len(np.unique(rows.rerotated.row)) < len(rows.query_lens),
        "split_pages": case.kernel_page < case.manager_page,
        "all_heads_dense": has_rows
        and any(len(case.dense_for(one.plan)) == case.kv_heads for one in case.requests if one.plan is not None),
        "calls_on_some_heads": in_calls,
        "calls_on_three_kinds": in_calls and len(set(case.kinds)) > 2,
    }


def hold(base: Any, tally: Tally, strategy: Any, examples: int, *, fp8_query: bool = True) -> Tally:
    """Run ``examples`` steps of a strategy on a backend, and count them in ``tally``.

    An eighth of them have rows of scattered pages. ``tally.more`` runs one of which a fact is true.
    """

    def run(part: Any, count: int) -> None:
        @settings(
            max_examples=count,
            deadline=None,
            derandomize=True,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(part)
        def add(case: Any) -> None:
            tally.add(case, base, fp8_query)

        add()

    gathered = -(-examples // 8)
    run(strategy.filter(gathers_pages), gathered)
    run(strategy, examples - gathered)
    tally.more = lambda fact: run(strategy.filter(lambda case: facts_of(case, rows_of(case))[fact]), 1)
    return tally


def flash_attention(capability: tuple[int, int], examples: int, **drawn: Any) -> Tally:
    PLATFORM.capability = DeviceCapability(*capability)
    torch.cuda.get_device_capability = lambda device=None: capability
    kernels.install_flash_attention()
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    return hold(FlashAttentionBackend, Tally(by_parts(drawn)), cases(**drawn), examples)


def flashinfer(capability: tuple[int, int], examples: int, **drawn: Any) -> Tally:
    PLATFORM.capability = DeviceCapability(*capability)
    from tests.gpu_contract.flashinfer_kernels import install_flashinfer

    install_flashinfer()
    from vllm.v1.attention.backends.flashinfer import FlashInferBackend

    strategy = cases(**{"fp8": True, "decodes_first": True} | drawn)
    return hold(FlashInferBackend, Tally(by_parts(drawn)), strategy, examples, fp8_query=False)


def triton(examples: int, **drawn: Any) -> Tally:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    # The interpreter takes milliseconds for each tile of keys, so the batches are small.
    strategy = cases(fp8=True, sinks=True, max_tokens=180, max_queries=10, max_heads=4, max_requests=3, **drawn)
    tally = Tally(by_parts(drawn))
    for part in (strategy.filter(gathers_pages), strategy):
        hold(TritonAttentionBackend, tally, part, examples, fp8_query=False)
    return tally


def paged_triton(examples: int, **drawn: Any) -> Tally:
    """Starling's Triton kernels as the backend of all layers (``gpu_attention``), interpreted."""
    from starling.attention_backends.paged.paged_backend import TritonBackend

    options = {"fp8": True, "sinks": False, "max_tokens": 180, "max_queries": 10, "max_heads": 4, "max_requests": 3}
    strategy = cases(**options | drawn)
    tally = Tally(by_parts(drawn))
    for part in (strategy.filter(gathers_pages), strategy):
        hold(TritonBackend, tally, part, examples, fp8_query=False)
    return tally


def paged_xformers(examples: int) -> Tally:
    """xformers' paged kernel as the backend of all layers (``gpu_attention``), interpreted, in float32.

    The causal part is the reference's: FlashAttention needs a GPU.
    """
    os.environ["XFORMERS_ENABLE_TRITON"] = "1"
    from starling.attention_backends.kernels import xformers_paged
    from starling.attention_backends.paged.paged_backend import XformersBackend
    from tests.kernels.xformers.jobs import reference_causal_part

    for page_size in {page for _, page in PAGES}:
        operator = xformers_paged.paged_op(page_size)
        operator.SUPPORTED_DEVICES, operator.SUPPORTED_DTYPES = {"cpu"}, {torch.float32}
    xformers_paged.DTYPES, xformers_paged.causal_part = (torch.float32,), reference_causal_part
    strategy = cases(fp8=False, sinks=False, max_tokens=180, max_queries=10, max_heads=4, max_requests=3)
    unwindowed = strategy.filter(lambda case: case.window is None)
    tally = Tally()
    for part in (unwindowed.filter(gathers_pages), unwindowed):
        hold(XformersBackend, tally, part, examples)
    return tally


def own_positions(run: Callable[..., Tally], *args: Any, **drawn: Any) -> Tally:
    """A job whose requests have documents: vLLM's builders, and Starling's kernel in torch."""
    contract.uses_triton = lambda device: True
    range_attention.attend_in_ranges = attend_in_ranges
    return run(*args, own_positions=True, **drawn)


def dense_heads(run: Callable[..., Tally], *args: Any, **drawn: Any) -> Tally:
    """A job whose prompts may have heads that see everything."""
    return run(*args, dense_heads=True, **drawn)


def deterministic(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in which an operation that is not deterministic on a GPU is an error."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with OnlyDeterministic():
            return function(*args, **kwargs)

    return run


def triton_own_positions(examples: int) -> Tally:
    """As ``own_positions`` on vLLM's Triton backend, with Starling's Triton kernels, interpreted.

    What a GPU runs has to have the same result in each call.
    """
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    from starling.attention_backends.kernels.triton.ranges import attend_ranges

    calls: list[int] = []

    def counted(query: torch.Tensor, *args: Any, **options: Any) -> None:
        calls.append(len(query))
        attend_ranges(query, *args, **options, programs=3)

    range_attention.attend_in_ranges = counted
    contract.uses_triton = lambda device: True
    for owner, name in ((range_attention.RangeAttention, "attend"), (DocumentStep, "keep_ranges")):
        setattr(owner, name, deterministic(getattr(owner, name)))
    strategy = cases(
        fp8=False, sinks=False, max_tokens=180, max_queries=10, max_heads=4, max_requests=3, own_positions=True
    )
    tally = hold(TritonAttentionBackend, Tally(by_parts=True), strategy, examples)
    assert len(calls) >= tally.counts["rerotated"] > 0
    return tally


JOBS: dict[str, Callable[[], Tally]] = {
    "fa2": lambda: flash_attention((8, 0), 150, fp8=False, sinks=False),
    "fa3": lambda: flash_attention((9, 0), 200, fp8=True, sinks=True),
    "fa4": lambda: flash_attention((10, 0), 100, fp8=True, sinks=True),
    "flashinfer_sm80": lambda: flashinfer((8, 0), 100, sinks=False),
    "flashinfer_sm90": lambda: flashinfer((9, 0), 100, sinks=True),
    "flashinfer_sm100": lambda: flashinfer(
        # TRT-LLM's prefill of an fp8 cache takes 16 bit queries only, and it is the one with sinks.
        *((10, 0), 100),
        sinks=True,
        fp8_with_sinks=False,
        layouts=("LBHNC", "BLHNC"),
    ),
    "flashinfer_sm120": lambda: flashinfer((12, 0), 60, sinks=True),
    "triton": lambda: triton(16),
    "fa3_own": lambda: own_positions(flash_attention, (9, 0), 60, fp8=False, sinks=False),
    "flashinfer_sm100_own": lambda: own_positions(
        flashinfer, (10, 0), 60, fp8=False, sinks=False, layouts=("LBHNC", "BLHNC")
    ),
    "fa2_heads": lambda: dense_heads(flash_attention, (8, 0), 60, fp8=False, sinks=False),
    "fa3_heads": lambda: dense_heads(flash_attention, (9, 0), 100, fp8=True, sinks=True),
    "fa4_heads": lambda: dense_heads(flash_attention, (10, 0), 60, fp8=True, sinks=True),
    "flashinfer_sm80_heads": lambda: dense_heads(flashinfer, (8, 0), 60, sinks=False),
    "flashinfer_sm90_heads": lambda: dense_heads(flashinfer, (9, 0), 60, sinks=True),
    "flashinfer_sm100_heads": lambda: dense_heads(
        *(flashinfer, (10, 0), 60), sinks=True, fp8_with_sinks=False, layouts=("LBHNC", "BLHNC")
    ),
    "paged_triton": lambda: paged_triton(10),
    "paged_triton_heads": lambda: dense_heads(paged_triton, 6),
    "paged_triton_own": lambda: own_positions(paged_triton, 6, fp8=False),
    "paged_xformers": lambda: paged_xformers(10),
    "triton_heads": lambda: dense_heads(triton, 10),
    "triton_own": lambda: triton_own_positions(24),
}


def main() -> None:
    torch.set_num_threads(1)
    name, *facts = sys.argv[1:]
    tally = JOBS[name]()
    for fact in facts:
        if not tally.counts[fact]:
            tally.more(fact)
    print(json.dumps({"job": name, "worst": tally.worst, **tally.counts}))
