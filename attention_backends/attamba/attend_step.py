"""Attention of a layer for one step: new keys and values, written to the caches, and what every query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from starling.attention_backends.attamba.cache import KvPages, locate
from starling.attention_backends.attamba.chunks import PAGE_ROWS, ChunkPlan, StatesMade
from starling.attention_backends.kernels.contract import Operands
from starling.attention_backends.kernels.cpu.paged_op import DTYPES, VECTOR_SIZE, built_op
from starling.attention_backends.kernels.dispatch import paged_attention

if TYPE_CHECKING:
    from starling.attention_backends.attamba.attamba_backend import AttambaMetadata


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer's attention.

    Attributes:
        chunk: P, tokens of a chunk.
        window: tokens that a query sees one by one, including its own: L + 1.
        scale: factor of the scores.
    """

    chunk: int
    window: int
    scale: float


@dataclass(frozen=True)
class Cache:
    """A cache of K|V, and the metadata of the step for it."""

    pages: KvPages
    step: AttambaMetadata


def attend(
    query: torch.Tensor,
    mixed: tuple[torch.Tensor, ...],
    own: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    states: Cache,
    window: Cache,
    plan: ChunkPlan,
    sizes: Sizes,
) -> torch.Tensor:
    """Attention of every query to the keys it sees: chunk states, the window, and the state of token 0.

    K = rotated(own + mixed[0]) and V = own + mixed[1] of the step's tokens are stored before: in the window, and those
    of the ends of chunks as states. The three sets of keys are disjoint, so the merge is exact. On CPU, a C++ op
    (kernels/cpu/recent.h) does all of it.

    Args:
        query: (T, heads x head size), not rotated.
        mixed: two of (T, heads x head size), what the mixers of K and V give.
        own: (T, heads x head size), the layer's input.
        angles: cosines and sines (positions, head size / 2) float32, by which the pairs (2 j, 2 j + 1) are rotated.
        states, window: the caches.
        plan, sizes: of the layer.

    Returns:
        (T, heads x head size) in the query's dtype.
    """
    if not has_op_for(query, states.pages):
        return attend_in_torch(query, mixed, own, angles, states, window, plan, sizes)
    request, position, piece = states.step.token_places
    return built_op().attamba_attend(  # type: ignore[union-attr]
        query,
        *mixed,
        own,
        position,
        request,
        piece,
        *angles,
        states.pages.key_rows,
        states.pages.value_rows,
        states.pages.last_rows,
        states.step.block_table,
        states.step.key_table,
        window.pages.key_rows,
        window.pages.value_rows,
        window.step.block_table,
        window.step.key_table,
        window.step.query_start_loc,
        window.step.seq_lens,
        *plan.of_attention,
        sizes.chunk,
        sizes.window,
        sizes.scale,
    )


def has_op_for(query: torch.Tensor, pages: KvPages) -> bool:
    """Return whether the C++ op can run the attention."""
    on_cpu = query.device.type == "cpu" and query.dtype in DTYPES and query.stride(-1) == 1
    return on_cpu and pages.key_rows.shape[-1] % VECTOR_SIZE == 0 and built_op() is not None


def attend_in_torch(
    query: torch.Tensor,
    mixed: tuple[torch.Tensor, ...],
    own: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    states: Cache,
    window: Cache,
    plan: ChunkPlan,
    sizes: Sizes,
) -> torch.Tensor:
    """``attend`` on any device, by the attention op of ``paged_attention``."""
    request, position, piece = states.step.token_places
    host = plan  # what decides shapes is read on the host, without waiting for the device
    plan, made = plan.to(query.device)
    head_shape = states.pages.key_rows.shape[-2:]
    value = (own + mixed[1]).unflatten(-1, head_shape)
    query, key = (rotate(part.unflatten(-1, head_shape), angles, position) for part in (query, own + mixed[0]))

    window.pages.write(*locate(window.step.block_table, request, position, PAGE_ROWS), key, value)
    write_states(states, request, made, key, value)
    stairs = Operands(
        query,
        states.pages.keys,
        states.pages.values,
        states.step.key_table[plan.stair_piece],
        plan.stair_starts,
        plan.stair_states,
        scale=sizes.scale,
        queries_per_key=sizes.chunk,
        layout=states.pages.layout,
    )
    recent = Operands(
        query,
        window.pages.keys,
        window.pages.values,
        window.step.key_table,
        window.step.query_start_loc,
        window.step.seq_lens,
        scale=sizes.scale,
        window=sizes.window,
        layout=window.pages.layout,
    )
    state_out, state_lse = paged_attention(stairs)
    out, lse = paged_attention(recent)
    if host.token_0_seen.any():
        rows = states.pages.last_rows[states.step.key_table[:, 0]][piece]
        first, first_lse = attend_token_0(query, rows, plan.token_0_seen, sizes.scale)
        out, lse = merge_pair(out, lse, first, first_lse), torch.logaddexp(lse, first_lse)
    return merge_pair(out, lse, state_out, state_lse).to(query.dtype).flatten(1)


def rotate(heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], position: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2 j, 2 j + 1) of (T, heads, head size) by the angles of positions (T,), in float32."""
    cos, sin = (table[position][:, None] for table in angles)
    even, odd = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(heads.dtype)


def write_states(
    states: Cache, request: torch.Tensor, made: StatesMade, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Store the states of the chunks that end in the step.

    Args:
        request: (T,) of the tokens.
        made: which tokens make states.
        key, value: (T, heads, head size) of all tokens of the step.
    """
    ends, state, first = made
    where = locate(states.step.block_table, request[ends], state, PAGE_ROWS)
    states.pages.write(*where, key[ends], value[ends])
    states.pages.write_last(states.step.block_table[request[first], 0], key[first], value[first])


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
