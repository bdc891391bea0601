"""The contract on xformers' paged attention, where xformers_probe.py finds it usable.

xformers' paged operator supports rows of different query lengths without a causal mask only: with one it refuses them,
and its results are wrong if forced. So a causal row is split in two parts. The first part is the keys before the row's
own tokens, which all its queries see; they are read from the pages. The second part is the row's own tokens, which are
gathered from the pages and masked causally. The parts are merged by log-sum-exp.

The host reads the rows' lengths, as xformers' biases are made of them. xformers compiles its kernel again for each new
longest query and each new width of the block table. So this implementation suits steps of few shapes, and a CUDA graph
can't capture it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias, flash, triton_splitk

from starling.attention_backends.kernels.contract import Operands
from starling.attention_backends.kernels.merge import merge
from starling.attention_backends.kernels.xformers_probe import DTYPES, HEAD_SIZES


def context_bias(
    query_lens: Sequence[int], key_lens: Sequence[int], block_table: torch.Tensor, page_size: int
) -> attn_bias.PagedBlockDiagonalPaddedKeysMask:
    """Make a mask with which every query of row r sees the first ``key_lens[r]`` keys of block table row r."""
    return attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        query_lens, key_lens, block_table, page_size, device=block_table.device
    )


def own_bias(lens: Sequence[int], device: torch.device) -> attn_bias.BlockDiagonalCausalMask:
    """Make a mask with which token i of a row sees the row's tokens up to itself."""
    return attn_bias.BlockDiagonalMask.from_seqlens(lens, device=device).make_causal()


@functools.cache
def paged_op(page_size: int) -> type[triton_splitk.FwOp]:
    """Return xformers' split-K operator with key blocks that divide a page. Its own blocks have 64 keys.

    Raises:
        ValueError: the page size is no multiple of 16, the minimum of keys in a block.
    """
    if page_size % 16:
        raise ValueError(f"pages of {page_size} tokens: xformers' paged attention takes multiples of 16")
    block = next(block for block in (64, 32, 16) if page_size % block == 0)
    return type(f"PagedFwOp{block}", (triton_splitk.FwOp,), {"BLOCK_N": block, "NAME": f"triton_splitK_paged{block}"})


def flat_cache(cache: torch.Tensor) -> tuple[torch.Tensor, int]:
    """View a cache (pages, page size, KV heads, D) as (tokens, KV heads, D) over the same memory.

    Returns:
        The view, and the distance ``step`` of two pages in pages, which is 2 where K and V of a page are adjacent.
        Token ``k`` of page ``p`` is at ``p * step * page_size + k``.

    Raises:
        ValueError: the distance of two pages is no multiple of a page.
    """
    pages, page_size = cache.shape[:2]
    stride = cache.stride()
    step, rest = divmod(stride[0], page_size * stride[1])
    if pages > 1 and (rest or not step):
        raise ValueError(f"cache of shape {tuple(cache.shape)}, strides {stride}: xformers can't step over such pages")
    step = step if pages > 1 else 1
    tokens = ((pages - 1) * step + 1) * page_size
    return cache.as_strided((tokens, *cache.shape[2:]), stride[1:]), step


def causal_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lens: Sequence[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of rows to their own tokens, by the FlashAttention that torch brings.

    Args:
        query: (1, N, KV heads, group, D).
        key, value: of the query's shape, expanded over the group.
        lens: tokens of each row; they sum to N.
        scale: factor of the scores.

    Returns:
        out of the query's shape, lse (1, KV heads, group, N).
    """
    bias = own_bias(lens, query.device)
    return fmha.memory_efficient_attention_partial(query, key, value, bias, scale=scale, op=flash.FwOp)


def paged_attention(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract of contract.py.

    Raises:
        ValueError: ``check_supported``, ``flat_cache`` or ``paged_op`` refuses the operands, or the pages of keys and
            values have different distances.
    """
    check_supported(operands)
    query, sizes = operands.query, operands.sizes
    page_size, group, scale = sizes.page_size, sizes.group, operands.scale * operands.k_scale
    out = operands.make_out()
    if not sizes.tokens:
        return out, operands.make_lse()
    # xformers does not support rows without queries where the other rows have one query each.
    query_lens = operands.query_start_loc.diff()
    live = query_lens.nonzero().flatten()
    block_table = operands.block_table[live]
    queries, lens = query_lens[live].tolist(), operands.seq_lens[live].tolist()
    num_tokens = sum(queries)  # others may be behind those of the rows: a CUDA graph's padding
    grouped = query[:num_tokens].view(1, num_tokens, sizes.kv_heads, group, sizes.key_size)
    own = own_lens(queries, lens) if operands.causal else [0] * len(lens)
    context = [length - tokens for length, tokens in zip(lens, own, strict=True)]

    flat_keys, step = flat_cache(operands.keys)
    flat_values, value_step = flat_cache(operands.values)
    if step != value_step:
        raise ValueError(
            f"keys {operands.keys.stride()} and values {operands.values.stride()}: xformers steps over both alike"
        )
    outs = query.new_zeros(2, num_tokens, sizes.heads, sizes.value_size)
    lses = query.new_full((2, num_tokens, sizes.heads), float("-inf"), dtype=torch.float32)
    if any(context):
        outs[0], lses[0] = _ungroup(
            fmha.memory_efficient_attention_partial(
                grouped,
                _expand(flat_keys, group),
                _expand(flat_values, group),
                context_bias(queries, context, block_table * step, page_size),
                scale=scale,
                op=paged_op(page_size),
            )
        )
    if any(own):
        tokens, slots = own_tokens(queries, lens, own, block_table.cpu() * step, page_size)
        tokens, slots = tokens.to(query.device), slots.to(query.device)
        outs[1, tokens], lses[1, tokens] = _ungroup(
            causal_part(
                grouped[:, tokens],
                _expand(flat_keys[slots], group),
                _expand(flat_values[slots], group),
                [tokens for tokens in own if tokens],
                scale,
            )
        )
    merged, lse = merge(outs, lses)
    torch.mul(merged, operands.v_scale, out=out[:num_tokens])
    whole = operands.make_lse()
    whole[:num_tokens] = lse
    return out, whole


def check_supported(operands: Operands) -> None:
    """Refuse operands that xformers' paged attention does not support.

    Raises:
        ValueError: with the reason.
    """
    query, keys, sizes = operands.query.dtype, operands.keys.dtype, operands.sizes
    if query not in DTYPES or keys != query:
        raise ValueError(f"query {query}, cache {keys}: xformers takes both in float16, or both in bfloat16")
    if sizes.key_size not in HEAD_SIZES or sizes.value_size != sizes.key_size:
        raise ValueError(
            f"head sizes {sizes.key_size} and {sizes.value_size}: xformers takes one for both, of {HEAD_SIZES}"
        )
    if operands.row_heads is not None:
        raise ValueError("row_heads: each row of xformers' paged attention computes all heads")
    if operands.queries_per_key != 1:
        raise ValueError(f"queries_per_key={operands.queries_per_key}: xformers' causal masks have one key per query")
    if operands.window is not None or operands.softcap:
        raise ValueError(f"window={operands.window}, softcap={operands.softcap}: xformers' paged attention has neither")


def own_lens(queries: Sequence[int], lens: Sequence[int]) -> list[int]:
    """Return the number of each causal row's last queries that have a key of their own: min(queries, keys)."""
    return [min(pair) for pair in zip(queries, lens, strict=True)]


def own_tokens(
    queries: Sequence[int], lens: Sequence[int], own: Sequence[int], block_table: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the queries that have a key of their own, and the locations of these keys.

    Args:
        queries, lens: query tokens and keys of each row.
        own: result of ``own_lens``: the row's last ``own`` queries belong to its last ``own`` keys, in order.
        block_table: (R, C) int, on the host.
        page_size: tokens per page.

    Returns:
        (N,) int64 query tokens, and (N,) int64 indices of their keys in the flat cache, in the same order.
    """
    tokens, slots, start = [], [], 0
    for row, (count, length, last) in enumerate(zip(queries, lens, own, strict=True)):
        start += count
        tokens.append(torch.arange(start - last, start))
        position = torch.arange(length - last, length)
        slots.append(block_table[row, position // page_size].long() * page_size + position % page_size)
    return torch.cat(tokens), torch.cat(slots)


def _expand(flat: torch.Tensor, group: int) -> torch.Tensor:
    """(tokens, KV heads, D) -> (1, tokens, KV heads, group, D). The group's stride 0 is how xformers expresses GQA."""
    return flat[None, :, :, None].expand(-1, -1, -1, group, -1)


def _ungroup(result: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Reshape xformers' (1, T, KV heads, group, D) and (1, KV heads, group, T) to (T, H, D) and (T, H)."""
    out, lse = result
    return out[0].flatten(1, 2), lse[0].flatten(0, 1).T.float()
