"""The contract by its definition, in float64 with the mask written out: the oracle of every other implementation."""

from __future__ import annotations

import torch

from starling.attention_backends.kernels.contract import Operands


def paged_attention(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract of contract.py in float64, whatever the operands' dtype.

    A float64 query gives a float64 out and lse, with all digits.
    """
    out, lse, page_size = operands.make_out(), operands.make_lse(), operands.sizes.page_size
    for row in range(operands.sizes.rows):
        first, last = operands.query_start_loc[row : row + 2].tolist()
        queries, heads = torch.arange(first, last) % max(operands.sizes.tokens, 1), _heads_of(operands, row)
        length = int(operands.seq_lens[row])
        page_ids = operands.block_table[row, : -(-length // page_size)].long()
        mask = visible_mask(
            last - first,
            length,
            causal=operands.causal,
            queries_per_key=operands.queries_per_key,
            window=operands.window,
        )
        row_out, row_lse = masked_attention(
            operands.query[queries].double(),
            _gather(operands.keys, page_ids)[:length].double() * operands.k_scale,
            _gather(operands.values, page_ids)[:length].double() * operands.v_scale,
            mask.to(operands.query.device),
            operands.scale,
            operands.softcap,
        )
        at = queries[:, None], heads[None]
        out[at], lse[at] = row_out[:, heads].to(out.dtype), row_lse[:, heads].to(lse.dtype)
    return out, lse


def _heads_of(operands: Operands, row: int) -> torch.Tensor:
    """Return the query heads that a row computes."""
    heads = torch.arange(operands.sizes.heads)
    return heads if operands.row_heads is None else heads[operands.row_heads[row].cpu()[heads // operands.sizes.group]]


def visible_mask(
    queries: int, keys: int, *, causal: bool, queries_per_key: int = 1, window: int | None
) -> torch.Tensor:
    """Return a (queries, keys) bool mask of the keys that each query of a row sees.

    It has one comparison for each rule of the contract.
    """
    key = torch.arange(keys)[None, :]
    later = torch.arange(queries - 1, -1, -1)[:, None] if causal else torch.zeros(queries, 1, dtype=torch.int64)
    position = keys - 1 - later // queries_per_key
    mask = key <= position
    return mask if window is None else mask & (key > position - window)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence by its definition, in the operands' dtype.

    Keys that no query sees are left out: their values may be NaN, and 0 * NaN is NaN.

    Args:
        query: (q, H, D).
        key, value: (s, KV heads, D) and (s, KV heads, Dv); each KV head is repeated over the query heads it serves.
        mask: (q, s) bool, which keys each query sees.
        scale: factor of the scores.
        softcap: cap of the scores; 0 for none.

    Returns:
        out (q, H, Dv) and the scores' log-sum-exp (q, H); 0 and -inf where a query sees no key.
    """
    visible = mask.any(0)
    key, value, mask = key[visible], value[visible], mask[:, visible]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->qhk", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return torch.einsum("qhk,khd->qhd", weights, value), lse


def _gather(cache: torch.Tensor, page_ids: torch.Tensor) -> torch.Tensor:
    """Gather the tokens of n pages, (n * page size, KV heads, size), of a cache (pages, page size, KV heads, size)."""
    if cache.element_size() == 1:  # torch can't index float8 on every device, so the bytes are gathered
        return cache.view(torch.uint8)[page_ids].flatten(0, 1).view(cache.dtype)
    return cache[page_ids].flatten(0, 1)
