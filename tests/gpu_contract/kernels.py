"""GPU attention kernels by their documented contracts, on CPU tensors, with checks of what a kernel relies on.

The contract of FlashAttention is in vllm/vllm_flash_attn/flash_attn_interface.py, which runs here as it is: only the
compiled operators below it are replaced.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from vllm.utils.math_utils import cdiv, round_up

FP8 = torch.float8_e4m3fn


def require(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(f"kernel contract: {message}")


def check_batch(
    query: torch.Tensor,
    out: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    max_queries: int,
    max_keys: int,
) -> None:
    """Check the operands that describe rows: (R + 1,) query starts and (R,) numbers of keys."""
    for name, tensor in (("query starts", starts), ("lengths", lengths)):
        require(tensor.dtype == torch.int32, f"{name} are {tensor.dtype}, not int32")
        require(tensor.is_contiguous(), f"{name} are not contiguous")
        require(tensor.ndim == 1, f"{name} have {tensor.ndim} dimensions")
    require(len(starts) == len(lengths) + 1, f"{len(starts)} query starts of {len(lengths)} rows")
    require(query.shape == out.shape, f"query {tuple(query.shape)} and out {tuple(out.shape)} differ")
    require(query.stride(-1) == 1 and out.stride(-1) == 1, "the last dimension of query or out is not contiguous")
    query_lens = starts.diff()
    require(starts[0] == 0 and (query_lens >= 0).all(), f"query starts {starts.tolist()} do not rise from 0")
    require(starts[-1] <= len(query), f"query starts end at {int(starts[-1])} of {len(query)} tokens")
    require(query_lens.max() <= max_queries, f"a row has {int(query_lens.max())} queries, the maximum is {max_queries}")
    require((lengths >= 0).all(), "a negative length")
    require(lengths.max() <= max_keys, f"a row has {int(lengths.max())} keys, the maximum is {max_keys}")
    require((lengths >= query_lens).all(), f"rows of {query_lens.tolist()} queries have {lengths.tolist()} keys")


def check_pages(table: torch.Tensor, lengths: torch.Tensor, cache: torch.Tensor) -> None:
    """Check a block table (R, columns) of a cache (pages, page size, KV heads, size)."""
    require(table.dtype == torch.int32, f"the block table is {table.dtype}, not int32")
    require(table.ndim == 2 and table.stride(1) == 1, "the block table's columns are not contiguous")
    require(len(table) == len(lengths), f"{len(table)} rows in the block table, {len(lengths)} lengths")
    for row, length in enumerate(lengths.tolist()):
        num_pages = cdiv(length, cache.shape[1])
        require(num_pages <= table.shape[1], f"row {row} has {num_pages} pages in {table.shape[1]} columns")
        listed = table[row, :num_pages]
        require(
            ((listed >= 0) & (listed < len(cache))).all(), f"row {row} lists {listed.tolist()} of {len(cache)} pages"
        )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention in float64, aligned bottom-right: query (q, H, D), keys and values (s, KV heads, D)."""
    group = query.shape[1] // keys.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, keys.repeat_interleave(group, 1)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(len(query))[:, None] + len(keys) - len(query)
    key = torch.arange(len(keys))[None]
    hidden = key > position
    if window[0] >= 0:
        hidden |= key < position - window[0]
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(query), 1)], -1)
    weights = scores.softmax(-1)[..., : len(keys)]
    return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1))


def _pages(cache: torch.Tensor, ids: torch.Tensor, length: int, scale: torch.Tensor | float) -> torch.Tensor:
    if cache.dtype == FP8:  # torch can't index float8 on CPU
        gathered = cache.view(torch.uint8)[ids.long()].view(FP8).float()
    else:
        gathered = cache[ids.long()]
    return gathered.flatten(0, 1)[:length].double() * scale


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    rows: list[torch.Tensor] | torch.Tensor,
    *,
    scales: tuple[torch.Tensor | float, torch.Tensor | float, torch.Tensor | float] = (1.0, 1.0, 1.0),
    **arguments: Any,
) -> None:
    """Write the attention of each row to its tokens of ``out``.

    Args:
        query, out: (tokens, H, D).
        key_cache, value_cache: (pages, page size, KV heads, D).
        starts, lengths: (R + 1,) query starts and (R,) keys.
        rows: page ids of each row; more than a row needs are not read.
        scales: of query, keys and values.
        arguments: of ``attend``.
    """
    for row, length in enumerate(lengths.tolist()):
        first, last = starts[row : row + 2].tolist()
        if first == last or length == 0:
            continue
        ids = rows[row][: cdiv(length, key_cache.shape[1])]
        keys, values = _pages(key_cache, ids, length, scales[1]), _pages(value_cache, ids, length, scales[2])
        out[first:last] = attend(query[first:last].double() * scales[0], keys, values, **arguments).to(out.dtype)


def _flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    max_queries: int,
    max_keys: int,
    table: torch.Tensor,
    *,
    descales: tuple[torch.Tensor | None, ...] = (),
    causal: bool,
    **arguments: Any,
) -> torch.Tensor:
    require(causal is True, f"causal is {causal}")
    require(q.dtype == k.dtype == v.dtype, f"query {q.dtype}, keys {k.dtype} and values {v.dtype} differ")
    require(k.stride(-1) == 1 and v.stride(-1) == 1 and k.stride() == v.stride(), "strides of keys and values")
    check_batch(q, out, starts, lengths, max_queries, max_keys)
    check_pages(table, lengths, k)
    scales = [torch.tensor(1.0)] * 3
    for index, descale in enumerate(descales):
        if descale is not None:
            require(descale.shape == (len(lengths), k.shape[2]), f"a descale is {tuple(descale.shape)}")
            require(descale.dtype == torch.float32, f"a descale is {descale.dtype}")
            scales[index] = descale[0, 0]
    paged_attention(q, k, v, out, starts, lengths, table, scales=tuple(scales), **arguments)
    return out


def _metadata_of(lengths: torch.Tensor, heads: int, kv_heads: int, splits: int) -> torch.Tensor:
    """The size that FlashAttentionMetadataBuilder allocates for; it shows for which rows, heads and splits it is."""
    made = torch.zeros(1 + round_up(len(lengths), 4) * 4, dtype=torch.int32)
    made[0] = (splits * 1000 + heads) * 1000 + kv_heads
    made[1 : 1 + len(lengths)] = lengths
    return made


def _fa3_scheduler_metadata(*arguments: Any) -> torch.Tensor:
    batch_size, max_queries, max_keys = arguments[:3]
    lengths, starts = arguments[8], arguments[9]
    require(batch_size == len(lengths), f"batch size {batch_size} of {len(lengths)} rows")
    require(len(starts) == batch_size + 1, f"{len(starts)} query starts of {batch_size} rows")
    require(lengths.dtype == starts.dtype == torch.int32, "lengths or query starts are not int32")
    require(lengths.max() <= max_keys and starts.diff().max() <= max_queries, "rows above the maxima")
    return _metadata_of(lengths, *arguments[3:5], arguments[20])


def _fa3(*arguments: Any) -> tuple[torch.Tensor, None, None, None]:
    q, k, v = arguments[:3]
    out, starts, lengths = arguments[6], arguments[7], arguments[11]
    max_queries, max_keys, table = arguments[12:15]
    q_scale, k_scale, v_scale, scale, causal, left, right, softcap, _, metadata = arguments[20:30]
    splits, sinks = arguments[30], arguments[33]
    if metadata is not None:
        require(metadata.is_contiguous() and metadata.dtype == torch.int32, "scheduler metadata")
        made = _metadata_of(lengths, q.shape[1], k.shape[2], splits)
        require(torch.equal(metadata, made), "the scheduler metadata was made for other rows, heads or splits")
    _flash_attention(
        *(q, k, v, out, starts, lengths, max_queries, max_keys, table),
        descales=(q_scale, k_scale, v_scale),
        causal=causal,
        scale=scale,
        window=(left, right),
        softcap=softcap,
        sinks=sinks,
    )
    return out, None, None, None


def _fa2(*arguments: Any) -> tuple[torch.Tensor, None]:
    q, k, v, out, starts, _, lengths, _, table, _, max_queries, max_keys, _, scale, _, causal = arguments[:16]
    left, right, softcap = arguments[16:19]
    require(k.shape[1] % 16 == 0, f"FlashAttention 2 has no pages of {k.shape[1]} tokens")
    _flash_attention(
        *(q, k, v, out, starts, lengths, max_queries, max_keys, table),
        causal=causal,
        scale=scale,
        window=(left, right),
        softcap=softcap,
    )
    return out, None


def _fa4(q: Any, k: Any, v: Any, **named: Any) -> tuple[torch.Tensor, None, None, None]:
    require(named["mask_mod"] is None and named["dynamic_causal"] is None, "a mask")
    left, right = (-1 if size is None else size for size in (named["window_size_left"], named["window_size_right"]))
    batch = (named[name] for name in ("out", "cu_seqlens_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "page_table"))
    _flash_attention(
        *(q, k, v, *batch),
        descales=tuple(named[f"{name}_descale"] for name in "qkv"),
        causal=named["causal"],
        scale=named["softmax_scale"],
        window=(left, right),
        softcap=named["softcap"],
        sinks=named["learnable_sink"],
    )
    return named["out"], None, None, None


def install_flash_attention() -> None:
    """Put the operators where vLLM's FlashAttention interface and cache ops call them."""
    torch.ops._vllm_fa3_C = types.SimpleNamespace(fwd=_fa3, get_scheduler_metadata=_fa3_scheduler_metadata)
    torch.ops._vllm_fa2_C = types.SimpleNamespace(varlen_fwd=_fa2)
    sys.modules["vllm.vllm_flash_attn.cute.interface"]._flash_attn_fwd = _fa4
    from vllm.vllm_flash_attn import flash_attn_interface

    flash_attn_interface.FA4_AVAILABLE = True
