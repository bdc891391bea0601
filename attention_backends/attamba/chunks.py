"""Chunk boundaries in closed form, and the plan of one Attamba layer for one step. Pure functions.

Token 0 is a chunk of its own. A layer cuts the tokens after token 0 at boundaries k P - 1 - offset, k = 1, 2, ...
A boundary is the last token of its chunk, and the chunk's state has the number k - 1. Source: Attamba paper
(arXiv 2411.17685), section 3. The offsets are the "cyclic" offsets of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from attention_backends.star.rows import VirtualRows

PAGE_ROWS = 16  # chunk states of a page


def layer_offset(layer: int, num_layers: int, chunk_size: int) -> int:
    """Tokens by which the chunks of ``layer`` end earlier than those of layer 0; less than ``chunk_size``."""
    return min(chunk_size - 1, layer * (chunk_size // num_layers))


def chunk_start(position: np.ndarray, chunk_size: int, offset: int) -> np.ndarray:
    """First position of the chunk that each position lies in."""
    return np.where(position == 0, 0, np.maximum(1, (position + offset) // chunk_size * chunk_size - offset))


@dataclass(frozen=True)
class StepTokens:
    """The T tokens of a step, which belong to R requests, in the order of the batch.

    Star Attention cuts a request's tokens into pieces at the borders of star blocks. A piece sees only the states of
    the anchor and of its own block. Without Star Attention a request is one piece.

    Attributes:
        request: (T,) int64, row of the batch.
        position: (T,) int64, position in the request.
        piece: (T,) int64, row of the block tables to read keys from; equal to ``request`` where nothing is cut.
        block_start: (T,) int64, first position of the token's star block; 0 if the token sees all tokens before it.
        anchor: (T,) int64, number of tokens of the anchor, whose states the token sees; 0 without an anchor.
    """

    request: np.ndarray
    position: np.ndarray
    piece: np.ndarray
    block_start: np.ndarray
    anchor: np.ndarray

    def dense(self) -> StepTokens:
        """The same tokens under dense attention: each token sees all tokens before it."""
        return StepTokens(self.request, self.position, self.request, *np.zeros((2, len(self.request)), dtype=np.int64))


def dense_tokens(query_lens: np.ndarray, seq_lens: np.ndarray) -> StepTokens:
    """The tokens of a step under dense attention.

    Args:
        query_lens: (R,) int64, tokens of each request in this step.
        seq_lens: (R,) int64, tokens of each request so far, including this step.
    """
    request = np.repeat(np.arange(len(query_lens)), query_lens)
    first = np.cumsum(query_lens) - query_lens
    position = np.arange(len(request)) - first[request] + (seq_lens - query_lens)[request]
    return StepTokens(request, position, request, *np.zeros((2, len(request)), dtype=np.int64))


def profiled_tokens(num_tokens: int, chunk_size: int, offset: int, window: int, max_rows: int) -> StepTokens:
    """A step of ``num_tokens`` tokens that needs as much memory as any, for vLLM's memory profiling.

    The chunks have ``max_rows`` rows or more where ``num_tokens`` tokens can lie in so many. The first request has many
    tokens. Each of the others has one, in the last place of a chunk: such a chunk has the most rows for a token. All
    tokens see the state of token 0.

    Args:
        num_tokens: at least 1.
        chunk_size, offset, window: see ``plan_step``.
        max_rows: of a group of chunks, see ``ChunkPlan.groups``.
    """
    others = min(num_tokens - 1, max(0, -(-(max_rows - num_tokens) // chunk_size)))
    query_lens = np.array([num_tokens - others] + [1] * others)
    first = ((window + offset) // chunk_size + 2) * chunk_size - 1 - offset
    return dense_tokens(query_lens, first + query_lens)


def star_tokens(tokens: StepTokens, virtual: VirtualRows) -> StepTokens:
    """The same tokens cut into pieces, one piece for each virtual row of the cache of states."""
    piece = np.repeat(np.arange(len(virtual.source)), virtual.query_lens)
    end = tokens.position[np.cumsum(virtual.query_lens) - 1] + 1
    own = np.where(virtual.star, end - virtual.block_start, virtual.seq_lens)
    return StepTokens(
        tokens.request, tokens.position, piece, virtual.block_start[piece], (virtual.seq_lens - own)[piece]
    )


@dataclass(frozen=True)
class ChunkPlan:
    """The work of one layer in one step. N chunks have tokens in the step; each has at most W tokens so far.

    Attributes:
        chunk_request: (N,) int64, row of the batch.
        chunk_positions: (N, W) int64, positions of each chunk's tokens; a shorter chunk repeats its last position.
        chunk_index: (T,) int64, chunk (0 to N - 1) of each token of the step.
        index_in_chunk: (T,) int64, index of each token within its chunk.
        ends: (E,) int64, tokens of the step that end a chunk, including token 0.
        end_state: (E,) int64, number of the state that each end makes; -1 for the state of token 0.
        stair_starts: (S + 1,) int32, first token of each of S staircases, then T. A staircase lies in one piece. Its
            last P tokens see equally many states, the P tokens before those see one state fewer, and so on down to 0.
        stair_piece: (S,) int64, piece of each staircase.
        stair_states: (S,) int32, states that the last token of each staircase sees.
        token_0_seen: (T,) bool, whether the token sees the state of token 0.
    """

    chunk_request: np.ndarray
    chunk_positions: np.ndarray
    chunk_index: np.ndarray
    index_in_chunk: np.ndarray
    ends: np.ndarray
    end_state: np.ndarray
    stair_starts: np.ndarray
    stair_piece: np.ndarray
    stair_states: np.ndarray
    token_0_seen: np.ndarray

    def groups(self, max_rows: int) -> Iterator[tuple[slice, slice]]:
        """The chunks in groups of at most ``max_rows`` rows (chunks x W), or of one chunk, and the tokens of each."""
        count, width = self.chunk_positions.shape
        first = np.arange(0, count, max(1, max_rows // width))
        tokens = np.searchsorted(self.chunk_index, first)
        for chunk, token, end, token_end in zip(
            first, tokens, np.append(first[1:], count), np.append(tokens[1:], len(self.chunk_index)), strict=True
        ):
            yield slice(int(chunk), int(end)), slice(int(token), int(token_end))


def num_states_seen(tokens: StepTokens, chunk_size: int, offset: int, window: int) -> np.ndarray:
    """(T,) number of chunk states that each token sees: states of its anchor plus states of its own star block.

    A boundary inside the window is seen as a row of the window, not as a state. The window ends at the start of the
    star block. State k lies at positions [k P, (k + 1) P) of the cache whatever the offset, so an anchor or a block of
    whole pages has whole states.
    """
    before_window = np.maximum(tokens.block_start, tokens.position - window + offset)
    return tokens.anchor // chunk_size + before_window // chunk_size - tokens.block_start // chunk_size


def sees_token_0(tokens: StepTokens, chunk_size: int, offset: int, window: int) -> np.ndarray:
    """(T,) bool, whether the state of token 0 is a key of its own.

    Token 0 has to lie before the window or, for tokens outside of star block 0, in the anchor. With offset P - 1 token
    0 is boundary number 1, and its state is one of the chunk states.
    """
    seen = np.where(tokens.block_start > 0, tokens.anchor > 0, tokens.position > window)
    return seen & (offset != chunk_size - 1)


def num_keys_seen(tokens: StepTokens, chunk_size: int, offset: int, window: int) -> np.ndarray:
    """(T,) number of keys that each token attends to in a layer: chunk states, token 0's state, rows of the window."""
    window_keys = np.minimum(window, tokens.position - tokens.block_start) + 1
    states = num_states_seen(tokens, chunk_size, offset, window)
    return states + sees_token_0(tokens, chunk_size, offset, window) + window_keys


def plan_step(tokens: StepTokens, chunk_size: int, offset: int, window: int) -> ChunkPlan:
    """Plan one layer for one step.

    Args:
        tokens: the tokens of the step, at least one.
        chunk_size: P, tokens of a chunk.
        offset: of the layer, see ``layer_offset``.
        window: L, tokens that a token sees one by one besides itself.
    """
    request, position = tokens.request, tokens.position
    start = chunk_start(position, chunk_size, offset)
    opens = _run_starts(request, start)
    last = np.append(opens[1:], len(request)) - 1
    width = int((position[last] - start[opens]).max()) + 1

    is_boundary = (position + 1 + offset) % chunk_size == 0
    ends = np.flatnonzero(is_boundary | (position == 0))

    stairs, stair_states = _staircases(tokens.piece, num_states_seen(tokens, chunk_size, offset, window), chunk_size)
    return ChunkPlan(
        chunk_request=request[opens],
        chunk_positions=np.minimum(start[opens][:, None] + np.arange(width), position[last][:, None]),
        chunk_index=np.repeat(np.arange(len(opens)), last - opens + 1),
        index_in_chunk=position - start,
        ends=ends,
        end_state=np.where(is_boundary[ends], position[ends] // chunk_size, -1),
        stair_starts=np.append(stairs, len(request)).astype(np.int32),
        stair_piece=tokens.piece[stairs],
        stair_states=stair_states.astype(np.int32),
        token_0_seen=sees_token_0(tokens, chunk_size, offset, window),
    )


def _staircases(piece: np.ndarray, num_states: np.ndarray, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
    """First token of each staircase, and the number of states that its last token sees.

    A run is a sequence of tokens of one piece that see equally many states. Runs are joined into a staircase where a
    run of P tokens follows a run that sees one state fewer. A longer run, as at the start of a star block, is cut into
    runs of P tokens, because a step of a staircase holds P tokens. A run that sees no state is not cut: no step lies
    below it.
    """
    runs = _run_starts(piece, num_states)
    index_in_run = np.arange(len(piece)) - np.repeat(runs, np.diff(runs, append=len(piece)))
    runs = _run_starts(piece, num_states, np.where(num_states > 0, index_in_run // chunk_size, 0))
    states = num_states[runs]
    joins = (np.diff(runs, append=len(piece))[1:] == chunk_size) & (np.diff(states) == 1) & (np.diff(piece[runs]) == 0)
    first = np.append(True, ~joins)
    return runs[first], states[np.append(first[1:], True)]


def _run_starts(*columns: np.ndarray) -> np.ndarray:
    """Index 0, and every index at which a column differs from its previous value."""
    differs = np.zeros(len(columns[0]), dtype=bool)
    differs[0] = True
    for column in columns:
        differs[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(differs)
