"""Star rows through the wrapped backend of CPUs: vLLM's builder, cache layout and layer, against the explicit mask.

On GPUs a backend is made by an engine only; the engine checks cover its star rows.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from starling.attention_backends.kernels.contract import CPU_ISAS
from starling.attention_backends.kernels.cpu.attention import built_op
from starling.attention_backends.kernels.reference import masked_attention
from starling.attention_backends.star.step import StarStep, open_step
from starling.lab.machine import has_gpu
from starling.lab.selftest.kernels import GROUP, KV_HEADS, PAGE_SIZE, SIZE, rms
from starling.lab.selftest.masks import star_mask
from starling.lab.selftest.result import Check, Result, Skip
from starling.scheduler.star.plan import StarPlan
from starling.vllm_compat.config import cpu_attention_isa

HEADS, BOUND = KV_HEADS * GROUP, 2.0
STAR, DECODE = "star", "decode"
PLAN = StarPlan(block_size=96, anchor_size=64, overlap_size=32, context_end=570, num_prompt_tokens=600)
# (request, tokens before the step, tokens after it): the star chunk starts and ends within a star block.
BATCH = ((DECODE, 299, 300), (STAR, 70, 590))
DTYPES = (torch.float32, torch.bfloat16)


def row_checks() -> list[Check]:
    """Return a check for each attention op that CPU engines use."""
    return [
        Check("star rows: CPU_ATTN, vLLM's op", functools.partial(check_rows, False)),
        Check("star rows: CPU_ATTN, Starling's op", functools.partial(check_rows, True)),
    ]


def check_rows(own_op: bool, plan: StarPlan = PLAN) -> Result | Skip:
    """Measure the error of star rows over that of dense rows, both relative to their size, with the same Q, K and V.

    Args:
        own_op: True if Starling's op runs the rows, False if vLLM's does.
        plan: plan of the rows. The mask is that of ``PLAN``.
    """
    if has_gpu():
        return Skip("a GPU's backend is made by an engine: the engine checks compare its star rows with the mask")
    ratios = {}
    for dtype in DTYPES:
        if own_op and (built_op() is None or isa(dtype) not in CPU_ISAS):
            continue  # engines use vLLM's op then
        star, dense = (relative_error(own_op, dtype, given) for given in (plan, None))
        ratios[str(dtype).removeprefix("torch.")] = star / dense
    if not ratios:
        return Skip("Starling's op is not built, or this processor's KV layout is for vLLM's op")
    detail = ", ".join(f"{dtype} {ratio:.2f}" for dtype, ratio in ratios.items())
    return Result(max(ratios.values()), BOUND, "x the dense error", detail)


@functools.cache
def engine_config(dtype: torch.dtype) -> Any:
    """Return as much of an engine's configuration as the backend reads."""
    from vllm.config import VllmConfig

    config: Any = VllmConfig()
    config.model_config = SimpleNamespace(
        dtype=dtype, get_head_size=lambda: SIZE, get_num_attention_heads=lambda parallel: HEADS
    )
    config.cache_config.block_size = PAGE_SIZE
    return config


def isa(dtype: torch.dtype) -> str:
    """Return the instruction set that vLLM lays out the pages for."""
    return cpu_attention_isa(engine_config(dtype))


def relative_error(own_op: bool, dtype: torch.dtype, plan: StarPlan | None) -> float:
    """Return RMS error over RMS of the attention that the wrapped backend computes for ``BATCH``.

    Args:
        plan: plan of the star row, which is compared with the mask of ``PLAN``, or None to run it dense, against the
            causal mask.
    """
    generator = torch.Generator().manual_seed(0)
    keys = {name: torch.randn(2, end, KV_HEADS, SIZE, generator=generator).to(dtype) for name, _, end in BATCH}
    num_tokens = sum(end - start for _, start, end in BATCH)
    query = torch.randn(num_tokens, HEADS, SIZE, generator=generator).to(dtype)
    out = attend(own_op, query, keys, plan)
    exact, first = [], 0
    for name, start, end in BATCH:
        mask = torch.ones(end, end, dtype=torch.bool).tril()
        if name == STAR and plan is not None:
            sizes = {"block_size": PLAN.block_size, "anchor_size": PLAN.anchor_size}
            mask = star_mask(end, **sizes, overlap_size=PLAN.overlap_size, context_end=PLAN.context_end)
        queries = query[first : first + end - start].double()
        key, value = keys[name].double()
        exact.append(masked_attention(queries, key, value, mask[start:], SIZE**-0.5)[0])
        first += end - start
    expected = torch.cat(exact)
    return rms(out.double() - expected) / rms(expected)


def attend(own_op: bool, query: torch.Tensor, keys: dict[str, torch.Tensor], plan: StarPlan | None) -> torch.Tensor:
    """Write K and V of ``BATCH`` to pages, build the metadata of the step, and run the layer (tokens, heads, size)."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    builder, impl, layer = make_layer(own_op, query.dtype)
    columns = max(-(-end // PAGE_SIZE) for _, _, end in BATCH)
    table = torch.randperm(len(BATCH) * columns, generator=torch.Generator().manual_seed(1))
    table = table.view(len(BATCH), columns).int()
    cache = torch.zeros(len(BATCH) * columns, KV_HEADS, PAGE_SIZE, 2 * SIZE, dtype=query.dtype)
    for row, (name, _, end) in enumerate(BATCH):
        position = torch.arange(end)
        slots = table[row, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
        impl.do_kv_cache_update(layer, *keys[name], cache, slots)
    lens = [end - start for _, start, end in BATCH]
    starts = torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32)
    seq_lens = torch.tensor([end for _, _, end in BATCH], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=len(BATCH),
        num_actual_tokens=len(query),
        max_query_len=max(lens),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.zeros(len(query), dtype=torch.int64),
    )
    scheduled = dict(zip((name for name, _, _ in BATCH), lens, strict=True))
    step = plan and StarStep({STAR: plan}, scheduled, lambda: list(scheduled), lambda _: None)
    with open_step(step) if step else nullcontext():
        metadata = builder.build(0, common)
        return impl.forward(layer, query, None, None, cache, metadata, torch.full_like(query, float("nan")))


def make_layer(own_op: bool, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Make builder and implementation of the wrapped CPU_ATTN, and what they read of vLLM's layer."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from starling.attention_backends.star.backend import CPU_ATTN
    from starling.attention_backends.star.cpu_impl import CpuImpl

    class OneOp(CpuImpl):
        def uses_op(self, query: torch.Tensor, layer: Any, metadata: Any) -> bool:
            return own_op

    config = engine_config(dtype)
    spec = FullAttentionSpec(block_size=PAGE_SIZE, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=dtype)
    with set_current_vllm_config(config, check_compile=False):
        builder = CPU_ATTN.get_builder_cls()(spec, [], config, torch.device("cpu"))
        impl = OneOp(HEADS, SIZE, SIZE**-0.5, KV_HEADS, None, None, "auto")
    layer = SimpleNamespace(layer_name="layer", isa=isa(dtype), _k_scale_float=1.0, _v_scale_float=1.0)
    return builder, impl, layer
