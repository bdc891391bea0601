"""The number of keys that a prompt attends to, in closed form: clients get it before anything is computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from starling.attention_backends.attamba.chunks import layer_offset
from starling.scheduler.star.plan import StarPlan


def prompt_keys(plan: StarPlan | None, num_tokens: int, chunk_size: int, window: int, layers: int) -> dict[str, Any]:
    """Query-key pairs of a prompt per head and layer, averaged over the layers.

    A key is a chunk state or a row of the window.

    Args:
        plan: None for a dense prompt, which consists of context only.
        num_tokens: tokens of the prompt.
        chunk_size, window: P and L in tokens.
        layers: number of layers.

    Returns:
        ``keys_attended``, ``dense_keys`` and ``keys_per_context_token``, as in a plan's summary.
    """
    offsets = Counter(layer_offset(layer, layers, chunk_size) for layer in range(layers))

    def pairs(start: int, stop: int, block_start: int, anchor: int) -> float:
        keys = {offset: piece_keys(start, stop, block_start, anchor, chunk_size, offset, window) for offset in offsets}
        return sum(count * keys[offset] for offset, count in offsets.items()) / layers

    dense = pairs(0, num_tokens, 0, 0)
    context, total, context_end = dense, dense, num_tokens
    if plan is not None:
        context_end = plan.context_end
        # All whole blocks but the first attend to equally many keys: chunks end where star blocks do.
        size, num_whole = plan.block_size, context_end // plan.block_size
        context = pairs(0, min(size, context_end), 0, 0)
        if num_whole:
            context += (num_whole - 1) * pairs(size, 2 * size, size, plan.anchor_size)
            rest = num_whole * size
            context += pairs(rest, context_end, rest, plan.anchor_size)
        total = context + pairs(context_end, num_tokens, 0, 0)
    return {
        "keys_attended": round(total),
        "dense_keys": round(dense),
        "keys_per_context_token": round(context / max(context_end, 1), 1),
    }


def piece_keys(start: int, stop: int, block_start: int, anchor: int, chunk_size: int, offset: int, window: int) -> int:
    """Sum of ``chunks.num_keys_seen`` over positions [start, stop), all of which lie in one star block.

    ``block_start`` is 0 in block 0 and outside of star blocks. All sizes are tokens.
    """
    num_tokens, before = stop - start, window - offset
    # From this position on, states of the block lie before the window.
    first_with_states = min(max(start, block_start + before), stop)
    states = num_tokens * anchor // chunk_size - (stop - first_with_states) * (block_start // chunk_size)
    states += _sum_of_floors(stop - before, chunk_size) - _sum_of_floors(first_with_states - before, chunk_size)
    token_0 = num_tokens * (anchor > 0) if block_start else max(0, stop - max(start, window + 1))
    window_keys = _sum_of_window(stop - block_start, window) - _sum_of_window(start - block_start, window)
    return states + token_0 * (offset != chunk_size - 1) + window_keys


def _sum_of_floors(stop: int, chunk_size: int) -> int:
    """Sum of u // chunk_size for u from 0 to stop - 1; 0 if stop <= 0."""
    whole, rest = divmod(max(stop, 0), chunk_size)
    return chunk_size * whole * (whole - 1) // 2 + rest * whole


def _sum_of_window(stop: int, window: int) -> int:
    """Sum of min(window, u) + 1 for u from 0 to stop - 1."""
    short = min(stop, window)
    return short * (short + 1) // 2 + (stop - short) * (window + 1)
