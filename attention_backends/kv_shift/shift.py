"""The shift of K and V over a batch of chunks, in torch. A paged state holds the token before each chunk.

``K^_i = previous * K_{i-1} + current * K_i`` per KV head, and the same for V; position 0 has no predecessor
(arXiv 2411.19574, section 2). The predecessor of a row is the row above it. The predecessor of a request's first row is
in the state, in the page of the previous position, or does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_ROW = 2**31 - 1
"""First row of a request that has no tokens in this step (padding of a CUDA graph)."""
NO_SLOT = -1


@dataclass(frozen=True)
class ShiftMetadata:
    """Slots of the state for the R requests and T tokens of one step, on the device of the state.

    Attributes:
        first_rows: (R,) int32, the row of each request's first token in the step; NO_ROW for a request without tokens.
        first_slots: (R,) int64, the slot of the token before that first token; NO_SLOT if it is the request's first.
        slots: (T,) int64, the slot for each token's own K and V; negative for padding.
    """

    first_rows: torch.Tensor
    first_slots: torch.Tensor
    slots: torch.Tensor


def find_predecessors(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``first_rows`` and ``first_slots`` of a step, computed on the device without a synchronisation.

    Args:
        query_start_loc: (R + 1,) int32, rows of the batch at which requests start.
        seq_lens: (R,) int32, tokens of each request so far, including this step.
        block_table: (R, pages of a request) int32, page ids of the state.
        page_size: tokens of a page of the state.
    """
    starts = query_start_loc[:-1]
    query_lens = query_start_loc[1:] - starts
    computed = seq_lens - query_lens
    last = (computed - 1).clamp(min=0).long()
    page_ids = block_table.gather(1, (last // page_size)[:, None])[:, 0].long()
    first_slots = torch.where(computed > 0, page_ids * page_size + last % page_size, NO_SLOT)
    return torch.where(query_lens > 0, starts, NO_ROW), first_slots


def mix(previous: torch.Tensor, current: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of ``previous`` and ``current``, computed in float32 and rounded once to their dtype.

    Args:
        previous, current: (T, KV heads, head size).
        weights: (KV heads, 2), columns [previous, current].
    """
    weights = weights.float()
    mixed = previous.float() * weights[:, :1] + current.float() * weights[:, 1:]
    return mixed.to(current.dtype)


def shift(
    key: torch.Tensor,
    value: torch.Tensor,
    key_weights: torch.Tensor,
    value_weights: torch.Tensor,
    state: torch.Tensor,
    metadata: ShiftMetadata | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift K and V of a batch of chunks, and store the raw K and V in the state.

    Args:
        key, value: (T, KV heads * head size), raw: neither normed nor rotated.
        key_weights, value_weights: (KV heads, 2), columns [previous, current].
        state: (num_pages, KV heads, page_size, 2 * head size), K then V, any strides.
        metadata: None in runs without requests (profiling, warm-up), which do not change the state.

    Returns:
        Shifted K and V, each in the shape of ``key``.
    """
    heads = key_weights.shape[0]
    raw = torch.cat((key.unflatten(-1, (heads, -1)), value.unflatten(-1, (heads, -1))), dim=-1)
    tokens = raw.shape[0]
    # One extra row at the end, which requests without tokens write to.
    previous = raw.new_zeros((tokens + 1, *raw.shape[1:]))
    previous[1:] = raw
    if metadata is not None:
        page_size = state.shape[2]
        # Write before any read: vLLM lets a request find pages in the prefix cache that another request fills in the
        # same step. Padding writes to slot 0, in the null page, which vLLM gives to no request.
        slots = metadata.slots[:tokens].clamp(min=0)
        state[slots // page_size, :, slots % page_size] = raw[: len(slots)].to(state.dtype)
        first = metadata.first_slots.clamp(min=0)
        stored = state[first // page_size, :, first % page_size].to(raw.dtype)
        known = (metadata.first_slots >= 0)[:, None, None]
        previous[metadata.first_rows.clamp(max=tokens).long()] = torch.where(known, stored, 0)
    size = raw.shape[-1] // 2
    shifted_key = mix(previous[:tokens, :, :size], raw[..., :size], key_weights)
    shifted_value = mix(previous[:tokens, :, size:], raw[..., size:], value_weights)
    return shifted_key.flatten(1), shifted_value.flatten(1)
