"""Attention of a step over the caches of a layer: states, window, and token 0's own state, joined by log-sum-exp."""

from __future__ import annotations

import torch

from attention_backends.attamba.chunks import ChunkPlan
from attention_backends.attamba.pages import KvPages
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
    chunk: int,
    window_size: int,
    scale: float,
) -> torch.Tensor:
    """Attention of every query to the parts it sees; they are disjoint, and so joined exactly.

    Args:
        query: (T, heads, head size).
        states_table, window_table: block tables (pieces, columns).
        query_start_loc, seq_lens: (pieces + 1,) and (pieces,) int32, of the window's table.
        piece: (T,) int64, row of the block tables.
        plan: of the layer; ``chunk``: its P.
        window_size: tokens seen, the query's own among them.
    """
    device = query.device

    def on_device(array):
        return torch.from_numpy(array).to(device)

    far = paged_attention(
        query, states.keys, states.values, states_table[on_device(plan.stair_piece)], on_device(plan.stair_starts),
        on_device(plan.stair_states), scale=scale, queries_per_key=chunk, layout=states.layout,
    )  # fmt: skip
    near = paged_attention(
        query, window.keys, window.values, window_table, query_start_loc, seq_lens,
        scale=scale, window=window_size, layout=window.layout,
    )  # fmt: skip
    out, lse = near
    if plan.token_0_seen.any():
        seen = on_device(plan.token_0_seen)
        first = token_0(query, states.last_rows[states_table[:, 0]][piece], seen, scale)
        out, lse = join(out, lse, *first), torch.logaddexp(lse, first[1])
    return join(out, lse, *far).to(query.dtype)


def join(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """kernels/merge.py's merge of two parts in float32, of which the first has keys for every query, as a window has.

    The second has out 0 where it has none.
    """
    return torch.lerp(out.float(), other.float(), torch.sigmoid(other_lse - lse)[..., None])


def token_0(
    query: torch.Tensor, row: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to one key: its V, and its score as log-sum-exp; 0 and -inf where it is not seen.

    Args:
        row: (T, 2 x heads x head size), K|V of each query's own token 0.
        seen: (T,) bool.
    """
    key, value = (part.unflatten(-1, query.shape[1:]) for part in row.chunk(2, -1))
    score = (query.float() * key.float()).sum(-1) * scale
    return value.masked_fill(~seen[:, None, None], 0), score.masked_fill(~seen[:, None], float("-inf"))
