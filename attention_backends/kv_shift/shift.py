"""The shift over a batch of chunks, with what came before each chunk read from a paged state.

``K^_i = previous * K_{i-1} + current * K_i`` per KV head, the same for V, and nothing before position 0
(arXiv 2411.19574, section 2). A row's predecessor is the row above it, but for the first row of a request:
that one's lies in the state, in the page of the position before, or does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_ROW = 2**31 - 1
"""First row of a request that has no tokens in this step (padding of a CUDA graph)."""
NO_SLOT = -1


@dataclass(frozen=True)
class ShiftMetadata:
    """Where the state of one step's R requests and T tokens lies; on the device of the state.

    Attributes:
        first_rows: (R,) int32, the row of each request's first token; NO_ROW where it has none.
        first_slots: (R,) int64, the slot of the token before that one; NO_SLOT where there is none.
        slots: (T,) int64, the slot each token's own K and V go to; negative for padding.
    """

    first_rows: torch.Tensor
    first_slots: torch.Tensor
    slots: torch.Tensor


def find_predecessors(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, page: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``first_rows`` and ``first_slots`` of a step. Stays on the device, without a synchronisation.

    Args:
        query_start_loc: (R + 1,) int32, rows of the batch at which requests start.
        seq_lens: (R,) int32, tokens of each request so far, this step's included.
        block_table: (R, pages of a request) int32, of the state.
        page: tokens of a page of the state.
    """
    starts = query_start_loc[:-1]
    query_lens = query_start_loc[1:] - starts
    computed = seq_lens - query_lens
    last = (computed - 1).clamp(min=0).long()
    pages = block_table.gather(1, (last // page)[:, None])[:, 0].long()
    first_slots = torch.where(computed > 0, pages * page + last % page, NO_SLOT)
    return torch.where(query_lens > 0, starts, NO_ROW), first_slots


def mix(previous: torch.Tensor, current: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mix, in float32 and rounded once.

    Args:
        previous, current: (T, KV heads, head size).
        weights: (KV heads, 2), in columns [previous, current].
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
    """Shifted K and V of a batch of chunks; leaves the raw ones in the state.

    Args:
        key, value: (T, KV heads * head size), raw: neither normed nor rotated.
        key_weights, value_weights: (KV heads, 2), in columns [previous, current].
        state: (pages, KV heads, tokens of a page, 2 * head size), K then V, any strides.
        metadata: None in runs without requests (profiling, warm-up): the state is then left alone.
    """
    heads = key_weights.shape[0]
    raw = torch.cat((key.unflatten(-1, (heads, -1)), value.unflatten(-1, (heads, -1))), dim=-1)
    tokens = raw.shape[0]
    # One row more than there are tokens: the place for what requests without tokens would write.
    previous = raw.new_zeros((tokens + 1, *raw.shape[1:]))
    previous[1:] = raw
    if metadata is not None:
        page = state.shape[2]
        # Written before anything is read: vLLM lets a request find pages in the prefix cache that another one
        # fills in this very step. Padding goes to slot 0, which is in the page that vLLM keeps free of any request.
        slots = metadata.slots[:tokens].clamp(min=0)
        state[slots // page, :, slots % page] = raw[: len(slots)].to(state.dtype)
        first = metadata.first_slots.clamp(min=0)
        stored = state[first // page, :, first % page].to(raw.dtype)
        known = (metadata.first_slots >= 0)[:, None, None]
        previous[metadata.first_rows.clamp(max=tokens).long()] = torch.where(known, stored, 0)
    size = raw.shape[-1] // 2
    shifted_key = mix(previous[:tokens, :, :size], raw[..., :size], key_weights)
    shifted_value = mix(previous[:tokens, :, size:], raw[..., size:], value_weights)
    return shifted_key.flatten(1), shifted_value.flatten(1)
