"""The contract in plain torch operations, for machines without a compiler.

A row's pages are gathered in groups. Each group gives a partial out and log-sum-exp, which are merged with those of the
groups before (merge.py), so memory holds no more than one group of pages, however long a row is.
"""

from __future__ import annotations

from typing import Any

import torch

from starling.attention_backends.kernels.contract import Operands, visible_keys
from starling.attention_backends.kernels.merge import merge

GROUP_KEYS = 1024
TILE_QUERIES = 256


def paged_attention(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract of contract.py; sums are float64 if the query is, else float32."""
    out, lse = operands.make_out(), operands.make_lse()
    starts, lens, group = operands.query_start_loc.tolist(), operands.seq_lens.tolist(), operands.sizes.group
    for row, length in enumerate(lens):
        queries = starts[row + 1] - starts[row]
        heads = slice(None) if operands.row_heads is None else operands.row_heads[row]
        for first in range(0, queries, TILE_QUERIES):
            tile = range(first, min(first + TILE_QUERIES, queries))
            start = (starts[row] + tile.start) % operands.sizes.tokens
            tokens = slice(start, start + len(tile))
            tile_out, tile_lse = _attend_tile(operands, row, heads, tile, tokens, queries, length)
            out[tokens].unflatten(1, (-1, group))[:, heads] = tile_out.to(out.dtype)
            lse[tokens].unflatten(1, (-1, group))[:, heads] = tile_lse
    return out, lse


def _attend_tile(
    operands: Operands,
    row: int,
    heads: slice | torch.Tensor,
    tile: range,
    tokens: slice,
    queries: int,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some queries of one row to all keys they see.

    Args:
        heads: the KV heads.
        tile: numbers of the queries in their row, and ``tokens``: the same queries in ``operands.query``.
        queries, length: query tokens and keys of the row.

    Returns:
        out (tile, KV heads, group, Dv) and lse (tile, KV heads, group), both in the dtype of the sums.
    """
    sizes, window, device = operands.sizes, operands.window, operands.query.device
    wide = torch.promote_types(operands.query.dtype, torch.float32)
    rule: dict[str, Any] = {"causal": operands.causal, "queries_per_key": operands.queries_per_key, "window": window}
    first = visible_keys(tile[0], queries, length, **rule)[0]
    end = visible_keys(tile[-1], queries, length, **rule)[1]
    # Query head h reads KV head h // group: (KV heads, tile, group, D), scaled here once.
    query = operands.query[tokens].to(wide).unflatten(1, (sizes.kv_heads, -1)).movedim(0, 1)[heads]
    query = query * (operands.scale * operands.k_scale)
    out = query.new_zeros(*query.shape[:3], sizes.value_size)
    lse = query.new_full(query.shape[:3], float("-inf"))
    after = queries - 1 - torch.arange(tile.start, tile.stop, device=device)
    position = length - 1 - (after // operands.queries_per_key if operands.causal else torch.zeros_like(after))
    step = max(1, GROUP_KEYS // sizes.page_size) * sizes.page_size
    for base in range(first // sizes.page_size * sizes.page_size, end, step):
        stop = min(base + step, end)
        page_ids = operands.block_table[row, base // sizes.page_size : -(-stop // sizes.page_size)].long()
        keys = torch.arange(max(base, first), stop, device=device)
        mask = keys <= position[:, None]
        if window is not None:
            mask &= keys > position[:, None] - window
        group_out, group_lse = _attend_group(
            query,
            _gather(operands.keys, page_ids)[heads][:, keys - base].to(wide),
            _gather(operands.values, page_ids)[heads][:, keys - base].to(wide),
            mask[:, None, :],
            operands.softcap,
        )
        out, lse = merge(torch.stack((out, group_out)), torch.stack((lse, group_lse)))
    return (out * operands.v_scale).movedim(0, 1), lse.movedim(0, 1)


def _attend_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to one group of pages.

    Args:
        query: (KV heads, q, group, D).
        key, value: (KV heads, n, D) and (KV heads, n, Dv).
        mask: (q, 1, n) bool.

    Returns:
        out (KV heads, q, group, Dv) and lse (KV heads, q, group).
    """
    scores = (query.flatten(1, 2) @ key.mT).unflatten(1, query.shape[1:3])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill_(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp_()
    return (weights.flatten(1, 2) @ value).unflatten(1, query.shape[1:3]), lse


def _gather(cache: torch.Tensor, page_ids: torch.Tensor) -> torch.Tensor:
    """Gather the tokens of n pages, (KV heads, n * page size, size), of a cache (pages, page size, KV heads, size)."""
    if cache.element_size() == 1:  # torch can't index float8 on every device, so the bytes are gathered
        return cache.view(torch.uint8)[page_ids].flatten(0, 1).view(cache.dtype).transpose(0, 1).to(torch.float32)
    return cache[page_ids].flatten(0, 1).transpose(0, 1)
