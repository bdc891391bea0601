"""The mask of Star Attention, written out: the reference that tests compare the engine's virtual rows to.

It uses no code of rows.py: no pages and no plan object, but one comparison for each rule (arXiv 2411.17116, section 2;
the overlap is Starling's). kernels/reference.py's ``masked_attention`` computes the attention for a mask.
"""

from __future__ import annotations

import torch


def star_mask(
    num_tokens: int, *, block_size: int, anchor_size: int, overlap_size: int, context_end: int
) -> torch.Tensor:
    """(num_tokens, num_tokens) bool: whether the query at row q may see the key at column k.

    Args:
        num_tokens: prompt and generated tokens.
        block_size, anchor_size, overlap_size: of the star blocks, in tokens.
        context_end: position of the first token after the context.
    """
    positions = torch.arange(num_tokens)
    query, key = positions[:, None], positions[None, :]
    own_block = query // block_size == key // block_size
    anchor = key < anchor_size
    block_start = (query // block_size) * block_size
    overlap = (key < block_start) & (key >= block_start - overlap_size)
    is_query = query >= context_end
    return (key <= query) & (is_query | own_block | anchor | overlap)


def head_masks(mask: torch.Tensor, num_kv_heads: int, dense: set[int]) -> torch.Tensor:
    """(num_kv_heads, num_tokens, num_tokens) bool: what the KV heads of a layer see, of which some are dense.

    Args:
        mask: (num_tokens, num_tokens) bool, what the heads see that are not.
        dense: the KV heads that see everything before them.
    """
    masks = mask.expand(num_kv_heads, *mask.shape).clone()
    masks[sorted(dense)] = torch.ones_like(mask).tril()
    return masks
