"""The contract by its definition, in float64 with the mask written out: the oracle of every other implementation."""

from __future__ import annotations

import torch

from attention_backends.kernels.contract import Layout, check, page_views


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
    """contract.py; computes in float64 whatever the operands' dtype, so a float64 query shows all digits."""
    sizes = check(
        query, key_cache, value_cache, block_table, query_start_loc, seq_lens,
        queries_per_key=queries_per_key, window=window, softcap=softcap, out=out, layout=layout,
    )  # fmt: skip
    keys, values = page_views(key_cache, value_cache, layout)
    if out is None:
        out = query.new_empty(sizes.tokens, sizes.heads, sizes.value_size)
    lse = query.new_empty(sizes.tokens, sizes.heads, dtype=torch.promote_types(query.dtype, torch.float32))
    for row in range(sizes.rows):
        first, last = query_start_loc[row : row + 2].tolist()
        length = int(seq_lens[row])
        pages = block_table[row, : -(-length // sizes.page)].long()
        row_lse, row_out = masked_attention(
            query[first:last].double(),
            _gather(keys, pages)[:length].double() * k_scale,
            _gather(values, pages)[:length].double() * v_scale,
            visible_mask(last - first, length, causal=causal, queries_per_key=queries_per_key, window=window).to(
                query.device
            ),
            scale,
            softcap,
        )
        lse[first:last], out[first:last] = row_lse.to(lse.dtype), row_out.to(out.dtype)
    return out, lse


def visible_mask(
    queries: int, keys: int, *, causal: bool, queries_per_key: int = 1, window: int | None
) -> torch.Tensor:
    """(queries, keys) bool: one comparison for each rule of the contract."""
    key = torch.arange(keys)[None, :]
    later = torch.arange(queries - 1, -1, -1)[:, None] if causal else torch.zeros(queries, 1, dtype=torch.int64)
    position = keys - 1 - later // queries_per_key
    mask = key <= position
    return mask if window is None else mask & (key > position - window)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row: query (q, H, D), key and value (s, KV heads, D or Dv), mask (q, s) -> lse (q, H), out (q, H, Dv).

    Keys that no query sees are left out: their values may be NaN, which a weight of 0 would not silence.
    """
    seen = mask.any(0)
    key, value, mask = key[seen], value[seen], mask[:, seen]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->qhk", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return lse, torch.einsum("qhk,khd->qhd", weights, value)


def _gather(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """(P, page, KV heads, size) and (n,) page numbers -> (n * page, KV heads, size)."""
    if cache.element_size() == 1:  # float8 has no index kernel everywhere: gather its bytes
        return cache.view(torch.uint8)[pages].flatten(0, 1).view(cache.dtype)
    return cache[pages].flatten(0, 1)
