"""Masks of Star Attention, written out: `starling selftest` and the tests hold the engine's virtual rows against them.

It uses no code of rows.py: no pages and no plan object, but one comparison for each rule (arXiv 2411.17116, section 2;
the overlap is Starling's). kernels/reference.py's ``masked_attention`` computes the attention for a mask.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Heads = Collection[tuple[int, int]]
"""(layer, KV head)s."""


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


@contextmanager
def masks_by_head(model: Any, mask: torch.Tensor, dense_heads: Heads) -> Iterator[None]:
    """While this holds, the layers of a model of Transformers that have dense heads have a mask for each query head.

    Args:
        model: with eager attention.
        mask: (tokens, tokens) bool, what the other heads see.
        dense_heads: see everything before them.
    """
    config, handles = model.config.get_text_config(), []
    layers = {getattr(module, "layer_idx", None): module for module in model.modules() if hasattr(module, "o_proj")}
    for number in {layer for layer, _ in dense_heads}:
        dense = {head for layer, head in dense_heads if layer == number}
        masks = head_masks(mask, config.num_key_value_heads, dense)
        masks = masks.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 0)[None]
        bias = torch.zeros(masks.shape, dtype=model.dtype).masked_fill(~masks, torch.finfo(model.dtype).min)

        def give(module: Any, args: Any, kwargs: dict, bias: torch.Tensor = bias) -> tuple[Any, dict]:
            return args, kwargs | {"attention_mask": bias}

        handles.append(layers[number].register_forward_pre_hook(give, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
