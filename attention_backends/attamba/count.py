"""How many keys a prompt attends to, in closed form: what a client is told of its plan before anything is computed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from attention_backends.attamba.chunks import layer_offset
from scheduler.plan import StarPlan


def prompt_keys(plan: StarPlan | None, num_tokens: int, chunk: int, window: int, layers: int) -> dict[str, Any]:
    """Query-key pairs of a prompt per head and layer, a mean over the layers, under the names of a plan's summary.

    A key is a chunk state or a row of the window.

    Args:
        plan: None for a dense prompt, which is all context.
    """
    offsets = Counter(layer_offset(layer, layers, chunk) for layer in range(layers))

    def pairs(start: int, stop: int, block_start: int, anchor: int) -> float:
        seen = {offset: piece_keys(start, stop, block_start, anchor, chunk, offset, window) for offset in offsets}
        return sum(count * seen[offset] for offset, count in offsets.items()) / layers

    dense = pairs(0, num_tokens, 0, 0)
    context, total, context_end = dense, dense, num_tokens
    if plan is not None:
        context_end = plan.context_end
        starts = range(0, context_end, plan.block_size)
        context = sum(
            pairs(start, min(start + plan.block_size, context_end), start, plan.anchor_size if start else 0)
            for start in starts
        )
        total = context + pairs(context_end, num_tokens, 0, 0)
    return {
        "keys_attended": round(total),
        "dense_keys": round(dense),
        "keys_per_context_token": round(context / max(context_end, 1), 1),
    }


def piece_keys(start: int, stop: int, block_start: int, anchor: int, chunk: int, offset: int, window: int) -> int:
    """Sum of ``chunks.keys_seen`` over positions [start, stop) of one star block, or of none: ``block_start`` 0."""
    tokens, before = stop - start, window - offset
    leaves = min(max(start, block_start + before), stop)  # from here on, states of the block lie behind the window
    states = tokens * anchor // chunk - (stop - leaves) * (block_start // chunk)
    states += _sum_of_floors(stop - before, chunk) - _sum_of_floors(leaves - before, chunk)
    token_0 = tokens * (anchor > 0) if block_start else max(0, stop - max(start, window + 1))
    near = _sum_of_window(stop - block_start, window) - _sum_of_window(start - block_start, window)
    return states + token_0 * (offset != chunk - 1) + near


def _sum_of_floors(stop: int, chunk: int) -> int:
    """Sum of u // chunk for u from 0 to stop - 1; 0 where stop is not above 0."""
    whole, rest = divmod(max(stop, 0), chunk)
    return chunk * whole * (whole - 1) // 2 + rest * whole


def _sum_of_window(stop: int, window: int) -> int:
    """Sum of min(window, u) + 1 for u from 0 to stop - 1."""
    short = min(stop, window)
    return short * (short + 1) // 2 + (stop - short) * (window + 1)
