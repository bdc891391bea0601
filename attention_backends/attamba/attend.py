"""Attention of a step over the caches of a layer: states, window, and token 0's own state, joined by log-sum-exp."""

from __future__ import annotations

import torch

from attention_backends.attamba.chunks import PAGE_ROWS, ChunkPlan
from attention_backends.kernels.dispatch import paged_attention
from attention_backends.kernels.merge import merge


def heads_of(pages: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of (pages, rows, 2 x heads x head size), each (pages, 16, heads, head size)."""
    key, value = pages[:, :PAGE_ROWS].chunk(2, -1)
    return key.unflatten(-1, (heads, -1)), value.unflatten(-1, (heads, -1))


def attend(
    query: torch.Tensor,
    states: torch.Tensor,
    states_table: torch.Tensor,
    window: torch.Tensor,
    window_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    piece: torch.Tensor,
    plan: ChunkPlan,
    window_size: int,
    scale: float,
) -> torch.Tensor:
    """Attention of every query to the parts it sees; they are disjoint, and so joined exactly.

    Args:
        query: (T, heads, head size).
        states, window: (pages, 17, 2 x heads x head size); their block tables (pieces, columns).
        query_start_loc, seq_lens: (pieces + 1,) and (pieces,) int32, of the window's table.
        piece: (T,) int64, row of the block tables.
        plan: of the layer.
        window_size: tokens seen, the query's own among them.
    """
    heads = query.shape[1]
    device = query.device

    def on_device(array):
        return torch.from_numpy(array).to(device)

    keys, values = heads_of(states, heads)
    runs = on_device(plan.run_piece)
    far = paged_attention(
        query, keys, values, states_table[runs], on_device(plan.run_starts), on_device(plan.run_states),
        scale=scale, causal=False,
    )  # fmt: skip
    keys, values = heads_of(window, heads)
    near = paged_attention(
        query, keys, values, window_table, query_start_loc, seq_lens, scale=scale, window=window_size
    )
    parts = [far, near]
    if plan.token_0_seen.any():
        seen = on_device(plan.token_0_seen)
        parts.append(token_0(query, states[states_table[:, 0].long(), PAGE_ROWS][piece], seen, scale))
    outs, lses = (torch.stack(each) for each in zip(*parts, strict=True))
    return merge(outs, lses)[0]


def token_0(
    query: torch.Tensor, row: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to one key: its V, and its score as log-sum-exp.

    Args:
        row: (T, 2 x heads x head size), K|V of each query's own token 0.
        seen: (T,) bool.
    """
    key, value = (part.unflatten(-1, query.shape[1:]) for part in row.chunk(2, -1))
    score = (query.float() * key.float()).sum(-1) * scale
    return value, score.masked_fill(~seen[:, None], float("-inf"))
