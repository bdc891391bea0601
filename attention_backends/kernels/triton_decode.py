"""Paged decode in Triton: each row's keys are split over programs, and the parts merged by log-sum-exp.

A decode batch has too few query tiles to fill a GPU; with the keys split it has enough (Flash-Decoding).
vLLM's ``decode_attention_fwd`` is not used: it has no window, gives NaN for a row without keys, takes one
query a row, and in its kernel for one head a KV head multiplies Q and K in the query's dtype, so that its
log-sum-exp is good to bfloat16 only.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from attention_backends.kernels.contract import Layout, check
from attention_backends.kernels.triton_launch import launch, make_tile, prepare

LANES = 16
PROGRAMS_PER_MULTIPROCESSOR = 2
MIN_KEYS_OF_A_SPLIT = 256
MAX_SPLITS = 128


def num_splits(rows: int, heads: int, seq_len: int, multiprocessors: int) -> int:
    """Into how many parts to cut each row's keys: enough programs to fill the card, no part too short to pay.

    Args:
        rows: rows of the batch; ``heads``: KV heads. Their product is the programs without a split.
        seq_len: an upper bound of the keys of a row.
    """
    programs = max(1, rows * heads)
    wanted = -(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // programs)
    worth = -(-seq_len // MIN_KEYS_OF_A_SPLIT)
    return max(1, min(wanted, worth, MAX_SPLITS))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 1 on a CPU, where programs run one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def merge_kernel(
    parts,
    parts_lse,
    out,
    lse,
    splits,
    parts_split_stride,
    parts_token_stride,
    parts_head_stride,
    lse_split_stride,
    lse_token_stride,
    lse_head_stride,
    out_token_stride,
    out_head_stride,
    out_stride,
    out_lse_token_stride,
    HEAD_SIZE_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid (tokens, heads): the splits of one head's output, weighted by their share of the softmax's sum."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lane_s = tl.arange(0, BLOCK_S)
    lane_v = tl.arange(0, BLOCK_DV)
    parts_lse += token * lse_token_stride + head * lse_head_stride
    parts += token * parts_token_stride + head * parts_head_stride
    part_lse = tl.load(parts_lse + lane_s.to(tl.int64) * lse_split_stride, mask=lane_s < splits, other=float("-inf"))
    peak = tl.max(part_lse, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(part_lse - base), 0)
    acc = tl.zeros([BLOCK_DV], dtype=tl.float32)
    for _ in range(splits):
        weight = tl.exp(tl.load(parts_lse) - base)
        # A part without keys was never written.
        size = tl.where(weight > 0, HEAD_SIZE_V, 0)
        acc += weight * tl.load(parts + lane_v, mask=lane_v < size, other=0.0)
        parts_lse += lse_split_stride
        parts += parts_split_stride
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)
    out += token * out_token_stride + head * out_head_stride
    tl.store(out + lane_v * out_stride, acc.to(out.dtype.element_ty), mask=lane_v < HEAD_SIZE_V)
    tl.store(lse + token * out_lse_token_stride + head, tl.where(seen, base + tl.log(total), float("-inf")))


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
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of contract.py, right for rows of any length and fast for those of few queries.

    Args:
        splits: parts of each row's keys; by default ``num_splits`` of the longest row the block table holds.
            (A window counts: no part is made for keys that no query sees.)
    """
    sizes = check(
        query, key_cache, value_cache, block_table, query_start_loc, seq_lens,
        queries_per_key=queries_per_key, window=window, softcap=softcap, out=out, layout=layout,
    )  # fmt: skip
    keys, values = prepare(query, key_cache, value_cache, layout)
    tokens, heads, size = sizes.tokens, sizes.heads, sizes.value_size
    if out is None:
        out = query.new_empty(tokens, heads, size)
    if splits is None:
        longest = block_table.shape[1] * sizes.page
        longest = longest if window is None else min(longest, window)
        splits = num_splits(sizes.rows, sizes.kv_heads, longest, multiprocessors(query.device))
    lse = query.new_empty(tokens, heads, dtype=torch.float32)
    parts, parts_lse = out[None], lse[None]
    if splits > 1:
        parts = query.new_empty(splits, tokens, heads, size, dtype=torch.float32)
        parts_lse = query.new_empty(splits, tokens, heads, dtype=torch.float32)
    launch(
        query,
        keys,
        values,
        block_table,
        query_start_loc,
        seq_lens,
        parts,
        parts_lse,
        tile=make_tile(sizes, query.element_size(), LANES),
        scale=scale,
        causal=causal,
        queries_per_key=queries_per_key,
        window=window,
        softcap=softcap,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    if splits > 1 and tokens:
        merge_kernel[(tokens, heads)](
            parts,
            parts_lse,
            out,
            lse,
            splits,
            *parts.stride()[:3],
            *parts_lse.stride(),
            *out.stride(),
            lse.stride(0),
            HEAD_SIZE_V=size,
            BLOCK_DV=triton.next_power_of_2(size),
            BLOCK_S=triton.next_power_of_2(splits),
        )
    return out, lse
