"""The contract in plain torch operations, a group of pages at a time: for machines without a compiler.

Each group gives a partial out and log-sum-exp, which join what is there already (merge.py), so that no more than a
group of pages is gathered, however long a row is.
"""

from __future__ import annotations

from typing import Any

import torch

from attention_backends.kernels.contract import Layout, check, page_views, visible_keys
from attention_backends.kernels.merge import merge

GROUP_KEYS = 1024
TILE_QUERIES = 256


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
    """contract.py; sums in float32, or float64 where query is."""
    sizes = check(
        query, key_cache, value_cache, block_table, query_start_loc, seq_lens,
        queries_per_key=queries_per_key, window=window, softcap=softcap, out=out, layout=layout,
    )  # fmt: skip
    keys, values = page_views(key_cache, value_cache, layout)
    if out is None:
        out = query.new_empty(sizes.tokens, sizes.heads, sizes.value_size)
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(sizes.tokens, sizes.heads, dtype=wide)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for row, length in enumerate(lens):
        queries = starts[row + 1] - starts[row]
        for tile in range(0, queries, TILE_QUERIES):
            numbers = range(tile, min(tile + TILE_QUERIES, queries))
            rule: dict[str, Any] = {"causal": causal, "queries_per_key": queries_per_key, "window": window}
            first = visible_keys(numbers[0], queries, length, **rule)[0]
            end = visible_keys(numbers[-1], queries, length, **rule)[1]
            tokens = slice(starts[row] + numbers[0], starts[row] + numbers[-1] + 1)
            # Query head h reads KV head h // group: (KV heads, tile, group, D), scaled here once.
            grouped = query[tokens].to(wide).unflatten(1, (sizes.kv_heads, -1)).movedim(0, 1) * (scale * k_scale)
            total = grouped.new_zeros(*grouped.shape[:3], sizes.value_size)
            logs = grouped.new_full(grouped.shape[:3], float("-inf"))
            after = queries - 1 - torch.arange(numbers[0], numbers[-1] + 1, device=query.device)
            position = length - 1 - (after // queries_per_key if causal else torch.zeros_like(after))
            step = max(1, GROUP_KEYS // sizes.page) * sizes.page
            for base in range(first // sizes.page * sizes.page, end, step):
                stop = min(base + step, end)
                pages = block_table[row, base // sizes.page : -(-stop // sizes.page)].long()
                span = torch.arange(max(base, first), stop, device=query.device)
                mask = span <= position[:, None]
                if window is not None:
                    mask &= span > position[:, None] - window
                part = _attend(
                    grouped,
                    _gather(keys, pages)[:, span - base].to(wide),
                    _gather(values, pages)[:, span - base].to(wide),
                    mask[:, None, :],
                    softcap,
                )
                total, logs = merge(torch.stack((total, part[0])), torch.stack((logs, part[1])))
            out[tokens] = (total * v_scale).movedim(0, 1).flatten(1, 2).to(out.dtype)
            lse[tokens] = logs.movedim(0, 1).flatten(1, 2)
    return out, lse


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One group: query (KV heads, q, group, D), key and value (KV heads, n, D or Dv), mask (q, 1, n) -> out and lse."""
    scores = (query.flatten(1, 2) @ key.mT).unflatten(1, query.shape[1:3])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill_(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp_()
    return (weights.flatten(1, 2) @ value).unflatten(1, query.shape[1:3]), lse


def _gather(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """(P, page, KV heads, size) and (n,) page numbers -> (KV heads, n * page, size)."""
    if cache.element_size() == 1:  # float8 has no index kernel everywhere: gather its bytes
        return cache.view(torch.uint8)[pages].flatten(0, 1).view(cache.dtype).transpose(0, 1).to(torch.float32)
    return cache[pages].flatten(0, 1).transpose(0, 1)
