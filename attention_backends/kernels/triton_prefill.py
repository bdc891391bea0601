"""Paged prefill and extend in Triton: a program a query tile and KV head, over all keys its queries see."""

from __future__ import annotations

import torch

from attention_backends.kernels.contract import Layout, check
from attention_backends.kernels.triton_launch import launch, make_tile, prepare

LANES = 128


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
    """The contract of contract.py."""
    sizes = check(
        query, key_cache, value_cache, block_table, query_start_loc, seq_lens,
        queries_per_key=queries_per_key, window=window, softcap=softcap, out=out, layout=layout,
    )  # fmt: skip
    keys, values = prepare(query, key_cache, value_cache, layout)
    if out is None:
        out = query.new_empty(sizes.tokens, sizes.heads, sizes.value_size)
    lse = query.new_empty(sizes.tokens, sizes.heads, dtype=torch.float32)
    launch(
        query,
        keys,
        values,
        block_table,
        query_start_loc,
        seq_lens,
        out[None],
        lse[None],
        tile=make_tile(sizes, query.element_size(), LANES),
        scale=scale,
        causal=causal,
        queries_per_key=queries_per_key,
        window=window,
        softcap=softcap,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return out, lse
