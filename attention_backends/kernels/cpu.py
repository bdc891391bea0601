"""The contract on a CPU: the C++ op of cpu_attention.cpp where it can be built, plain torch (fallback.py) elsewhere."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from attention_backends.kernels import fallback
from attention_backends.kernels.build import BuildError, load_op
from attention_backends.kernels.contract import Layout, Sizes, check, page_views

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = 16  # the op works on vectors of so many elements


@functools.cache
def built_op() -> Callable[..., torch.Tensor] | None:
    """The C++ op; None where it can't be built, said once."""
    try:
        return load_op()
    except BuildError as error:
        logger.warning("%s. Attention goes on in plain torch, which is slower.", error)
        return None


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    queries_per_key: int = 1,
    window: int | None = None,
    softcap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
    layout: Layout = Layout.PAGES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """contract.py, for what ``refusal`` has nothing against."""
    sizes = check(
        query, key_cache, value_cache, block_table, query_start_loc, seq_lens,
        queries_per_key=queries_per_key, window=window, softcap=softcap, out=out, layout=layout,
    )  # fmt: skip
    keys, values = page_views(key_cache, value_cache, layout)
    reason = refusal(query, keys, values, out, sizes, layout)
    if reason is not None:
        raise ValueError(reason)
    op = built_op()
    if op is None:
        return fallback.paged_attention(
            query, key_cache, value_cache, block_table, query_start_loc, seq_lens, scale=scale, causal=causal,
            queries_per_key=queries_per_key, window=window, softcap=softcap, k_scale=k_scale, v_scale=v_scale, out=out,
            layout=layout,
        )  # fmt: skip
    if out is None:
        out = query.new_empty(sizes.tokens, sizes.heads, sizes.value_size)
    lse = op(
        query, keys, values, block_table.contiguous(), query_start_loc.contiguous(), seq_lens.contiguous(), out,
        scale * k_scale, causal, queries_per_key, window or 0, softcap, v_scale, layout is Layout.CPU,
    )  # fmt: skip
    return out, lse


def refusal(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor | None,
    sizes: Sizes,
    layout: Layout,
) -> str | None:
    """Why the op does not take these operands, caches as ``page_views`` gives them; None where it does."""
    if query.device.type != "cpu":
        return f"query on {query.device}: this op is for cpu tensors"
    if query.dtype not in DTYPES:
        return f"query of {query.dtype}: one of {', '.join(map(str, DTYPES))}"
    if sizes.key_size % STEP or sizes.value_size % STEP:
        return f"head sizes {sizes.key_size} and {sizes.value_size}: multiples of {STEP}"
    if layout is Layout.CPU and sizes.page % STEP:
        return f"page of {sizes.page} tokens in layout {layout.value}: a multiple of {STEP}"
    inner = {"query": (query, 2), "values": (values, 3), "keys": (keys, 1 if layout is Layout.CPU else 3)}
    for name, (tensor, dim) in (inner | ({} if out is None else {"out": (out, 2)})).items():
        if tensor.stride(dim) != 1:
            return f"{name} with strides {tensor.stride()}: the innermost dimension must be contiguous"
    return None
