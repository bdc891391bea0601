"""Attention of a step over a layer's caches: states, window and the state of token 0, merged by log-sum-exp."""

from __future__ import annotations

import torch

from attention_backends.attamba.chunks import ChunkPlan
from attention_backends.attamba.pages import KvPages
from attention_backends.kernels.contract import Operands
from attention_backends.kernels.dispatch import paged_attention


def attend(
    query: torch.Tensor,
    states: KvPages,
    states_table: torch.Tensor,
    window: KvPages,
    window_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    piece: torch.Tensor,
    plan: ChunkPlan,
    chunk_size: int,
    window_size: int,
    scale: float,
) -> torch.Tensor:
    """Attention of every query to the keys it sees: chunk states, the window, and the state of token 0.

    The three sets of keys are disjoint, so the merge is exact.

    Args:
        query: (T, heads, head size).
        states, window: pages of the caches.
        states_table, window_table: block tables (pieces, columns) int32.
        query_start_loc, seq_lens: (pieces + 1,) and (pieces,) int32, of the window's block table.
        piece: (T,) int64, row of the block tables for each query.
        plan: of the layer.
        chunk_size: P, tokens of a chunk.
        window_size: tokens that a query sees one by one, including its own: L + 1.
        scale: factor of the scores.

    Returns:
        (T, heads, head size) in the query's dtype.
    """
    device = query.device

    def on_device(array):
        return torch.from_numpy(array).to(device)

    stairs = Operands(
        query,
        states.keys,
        states.values,
        states_table[on_device(plan.stair_piece)],
        on_device(plan.stair_starts),
        on_device(plan.stair_states),
        scale=scale,
        queries_per_key=chunk_size,
        layout=states.layout,
    )
    recent = Operands(
        query,
        window.keys,
        window.values,
        window_table,
        query_start_loc,
        seq_lens,
        scale=scale,
        window=window_size,
        layout=window.layout,
    )
    state_out, state_lse = paged_attention(stairs)
    out, lse = paged_attention(recent)
    if plan.token_0_seen.any():
        seen = on_device(plan.token_0_seen)
        other, other_lse = attend_token_0(query, states.last_rows[states_table[:, 0]][piece], seen, scale)
        out, lse = merge_pair(out, lse, other, other_lse), torch.logaddexp(lse, other_lse)
    return merge_pair(out, lse, state_out, state_lse).to(query.dtype)


def merge_pair(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Merge two partial outputs in float32, as kernels/merge.py does for any number.

    Args:
        out, lse: (T, heads, head size) and (T, heads). Every query must have a key in this part, as it has in a window.
        other, other_lse: the second part; 0 and -inf where a query has no key in it.

    Returns:
        (T, heads, head size) float32.
    """
    return torch.lerp(out.float(), other.float(), torch.sigmoid(other_lse - lse)[..., None])


def attend_token_0(
    query: torch.Tensor, row: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the state of token 0 as the only key: its V, and its score as the log-sum-exp.

    Args:
        query: (T, heads, head size).
        row: (T, 2 x heads x head size), K|V of token 0 of each query's request.
        seen: (T,) bool, whether the query sees that state.
        scale: factor of the scores.

    Returns:
        out (T, heads, head size), lse (T, heads); 0 and -inf where ``seen`` is false.
    """
    key, value = (part.unflatten(-1, query.shape[1:]) for part in row.chunk(2, -1))
    score = (query.float() * key.float()).sum(-1) * scale
    return value.masked_fill(~seen[:, None, None], 0), score.masked_fill(~seen[:, None], float("-inf"))
