"""Star Attention in plain torch with the mask written out: what the engine's virtual rows are held against.

Shares nothing with rows.py but the meaning of the numbers (arXiv 2411.17116, section 2; the overlap is
ours): no pages, no plan object, one comparison for each rule.
"""

from __future__ import annotations

import torch


def star_mask(
    num_tokens: int, *, block_size: int, anchor_size: int, overlap_size: int, context_end: int
) -> torch.Tensor:
    """(num_tokens, num_tokens) bool: may the query at row q see the key at column k.

    Args:
        num_tokens: prompt and generated tokens; sizes are in tokens, ``context_end`` is a position.
    """
    positions = torch.arange(num_tokens)
    query, key = positions[:, None], positions[None, :]
    own_block = query // block_size == key // block_size
    anchor = key < anchor_size
    block_start = (query // block_size) * block_size
    overlap = (key < block_start) & (key >= block_start - overlap_size)
    is_query = query >= context_end
    return (key <= query) & (is_query | own_block | anchor | overlap)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition, in the operands' dtype.

    Args:
        query: (tokens, heads, head size); key and value: (tokens, KV heads, head size), repeated over the
            query heads they serve.
        mask: (tokens, tokens) bool, with at least one True a row.

    Returns:
        out (tokens, heads, head size) and the log-sum-exp of the scores, (tokens, heads).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->qhk", query, key) * scale
    scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
    return torch.einsum("qhk,khd->qhd", scores.softmax(-1), value), scores.logsumexp(-1)
