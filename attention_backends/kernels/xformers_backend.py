"""The contract on xformers' paged attention, for where ``xformers_probe`` finds it.

Its paged operator takes rows of different query lengths without a causal mask only (with one it refuses them, and is
wrong if forced). So a causal row is cut in two: the keys before its own tokens, which all its queries see, from the
pages; and its own tokens, gathered from the pages, causal. The two are merged by log-sum-exp.

The host reads the rows' lengths, as the biases are made of them, and xformers compiles its kernel anew for each longest
query and width of the block table: this suits steps of few shapes, and no CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias, flash, triton_splitk

from attention_backends.kernels.contract import Layout, check, page_views
from attention_backends.kernels.merge import merge

HEAD_SIZES = (16, 32, 64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)


def context_bias(
    query_lens: Sequence[int], key_lens: Sequence[int], block_table: torch.Tensor, page: int
) -> attn_bias.PagedBlockDiagonalPaddedKeysMask:
    """Query row r sees the first ``key_lens[r]`` keys of block table row r, all of them."""
    return attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        query_lens, key_lens, block_table, page, device=block_table.device
    )


def own_bias(lens: Sequence[int], device: torch.device) -> attn_bias.BlockDiagonalCausalMask:
    """Token i of a row sees the row's tokens up to itself."""
    return attn_bias.BlockDiagonalMask.from_seqlens(lens, device=device).make_causal()


@functools.cache
def paged_op(page: int) -> type[triton_splitk.FwOp]:
    """xformers' split-K operator with key blocks that divide a page; its own are 64 keys.

    Raises:
        ValueError: a page is no multiple of the 16 keys a block has at least.
    """
    if page % 16:
        raise ValueError(f"pages of {page} tokens: xformers' paged attention takes multiples of 16")
    block = next(block for block in (64, 32, 16) if page % block == 0)
    return type(f"PagedFwOp{block}", (triton_splitk.FwOp,), {"BLOCK_N": block, "NAME": f"triton_splitK_paged{block}"})


def flat_cache(cache: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(pages, page, KV heads, D) -> (tokens, KV heads, D) over the same memory, and the pages between two pages.

    Token ``k`` of page ``p`` is at ``p * step * page + k``, where step is 2 for K and V of a page side by side.

    Raises:
        ValueError: pages do not lie at multiples of their own size.
    """
    pages, page = cache.shape[:2]
    stride = cache.stride()
    step, rest = divmod(stride[0], page * stride[1])
    if pages > 1 and (rest or not step):
        raise ValueError(f"cache of shape {tuple(cache.shape)}, strides {stride}: xformers can't step over such pages")
    step = step if pages > 1 else 1
    tokens = ((pages - 1) * step + 1) * page
    return cache.as_strided((tokens, *cache.shape[2:]), stride[1:]), step


def causal_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lens: Sequence[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ``lens`` tokens against themselves, causal, by the FlashAttention that torch brings.

    Args:
        query: (1, N, KV heads, group, D); key and value the same, expanded over the group.

    Returns:
        out of query's shape, lse (1, KV heads, group, N).
    """
    bias = own_bias(lens, query.device)
    return fmha.memory_efficient_attention_partial(query, key, value, bias, scale=scale, op=flash.FwOp)


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
    """The contract of contract.py, but for what ``check_supported`` refuses."""
    sizes = check(
        query, key_cache, value_cache, block_table, query_start_loc, seq_lens,
        queries_per_key=queries_per_key, window=window, softcap=softcap, out=out, layout=layout,
    )  # fmt: skip
    keys, values = page_views(key_cache, value_cache, layout)
    check_supported(query, keys, values, queries_per_key, window, softcap)
    if out is None:
        out = torch.empty_like(query)
    if not sizes.tokens:
        return out, query.new_empty(0, sizes.heads, dtype=torch.float32)
    group = sizes.heads // sizes.kv_heads
    grouped = query.view(1, sizes.tokens, sizes.kv_heads, group, sizes.key_size)
    # Among rows of one query each, xformers has no room for rows of none.
    live = query_start_loc.diff().nonzero().flatten()
    block_table = block_table[live]
    queries, lens = query_start_loc.diff()[live].tolist(), seq_lens[live].tolist()
    own = own_lens(queries, lens) if causal else [0] * len(lens)
    context = [length - tokens for length, tokens in zip(lens, own, strict=True)]

    flat_keys, step = flat_cache(keys)
    flat_values, value_step = flat_cache(values)
    if step != value_step:
        raise ValueError(f"keys {keys.stride()} and values {values.stride()}: xformers steps over both alike")
    outs = query.new_zeros(2, sizes.tokens, sizes.heads, sizes.value_size)
    lses = query.new_full((2, sizes.tokens, sizes.heads), float("-inf"), dtype=torch.float32)
    if any(context):
        outs[0], lses[0] = _ungroup(
            fmha.memory_efficient_attention_partial(
                grouped,
                _expand(flat_keys, group),
                _expand(flat_values, group),
                context_bias(queries, context, block_table * step, sizes.page),
                scale=scale * k_scale,
                op=paged_op(sizes.page),
            )
        )
    if any(own):
        tokens, slots = own_tokens(queries, lens, own, block_table.cpu() * step, sizes.page)
        tokens, slots = tokens.to(query.device), slots.to(query.device)
        outs[1, tokens], lses[1, tokens] = _ungroup(
            causal_part(
                grouped[:, tokens],
                _expand(flat_keys[slots], group),
                _expand(flat_values[slots], group),
                [tokens for tokens in own if tokens],
                scale * k_scale,
            )
        )
    merged, lse = merge(outs, lses)
    return torch.mul(merged, v_scale, out=out), lse


def check_supported(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries_per_key: int,
    window: int | None,
    softcap: float,
) -> None:
    """Refuse what xformers' paged attention has not."""
    if query.dtype not in DTYPES or keys.dtype != query.dtype:
        raise ValueError(
            f"query {query.dtype}, cache {keys.dtype}: xformers takes both in float16, or both in bfloat16"
        )
    if keys.shape[3] not in HEAD_SIZES or values.shape[3] != keys.shape[3]:
        raise ValueError(
            f"head sizes {keys.shape[3]} and {values.shape[3]}: xformers takes one for both, of {HEAD_SIZES}"
        )
    if queries_per_key != 1:
        raise ValueError(f"queries_per_key={queries_per_key}: xformers' masks go a key a query")
    if window is not None or softcap:
        raise ValueError(f"window={window}, softcap={softcap}: xformers' paged attention has neither")


def own_lens(queries: Sequence[int], lens: Sequence[int]) -> list[int]:
    """How many of each causal row's last queries have a key of their own: all, where the row has as many keys."""
    return [min(pair) for pair in zip(queries, lens, strict=True)]


def own_tokens(
    queries: Sequence[int], lens: Sequence[int], own: Sequence[int], block_table: torch.Tensor, page: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) query tokens, and (N,) places in the flat cache of the keys that are those tokens' own; in order.

    Args:
        own: of ``own_lens``: as many of a row's last queries, and of its last keys, belong together.
        block_table: (R, C) int, on the host.
    """
    tokens, slots, start = [], [], 0
    for row, (count, length, mine) in enumerate(zip(queries, lens, own, strict=True)):
        start += count
        tokens.append(torch.arange(start - mine, start))
        position = torch.arange(length - mine, length)
        slots.append(block_table[row, position // page].long() * page + position % page)
    return torch.cat(tokens), torch.cat(slots)


def _expand(flat: torch.Tensor, group: int) -> torch.Tensor:
    """(tokens, KV heads, D) -> (1, tokens, KV heads, group, D), the group a stride of 0: how xformers tells GQA."""
    return flat[None, :, :, None].expand(-1, -1, -1, group, -1)


def _ungroup(result: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """xformers' (1, T, KV heads, group, D) and (1, KV heads, group, T) -> (T, H, D) and (T, H)."""
    out, lse = result
    return out[0].flatten(1, 2), lse[0].flatten(0, 1).T.float()
