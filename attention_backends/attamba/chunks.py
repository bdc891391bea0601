"""Where chunks begin and end, in closed form, and what a step of the engine has to do about them. Pure functions.

A layer cuts the tokens after token 0, which is a chunk alone, at boundaries k P - 1 - offset, k = 1, 2, ...; a
boundary is its chunk's last token, and its state is number k - 1 (section 3 of the paper; the offsets are its "cyclic"
ones).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from attention_backends.star.rows import VirtualRows

PAGE_ROWS = 16  # chunk states of a page


def layer_offset(layer: int, layers: int, chunk: int) -> int:
    """How many tokens earlier than in layer 0 the chunks of ``layer`` end; below ``chunk``."""
    return min(chunk - 1, layer * (chunk // layers))


def chunk_start(position: np.ndarray, chunk: int, offset: int) -> np.ndarray:
    """First position of the chunk that each position lies in."""
    return np.where(position == 0, 0, np.maximum(1, (position + offset) // chunk * chunk - offset))


@dataclass(frozen=True)
class Rows:
    """The tokens of a step: T of them, of R requests, in the batch's order.

    Under Star Attention a request's tokens are cut at the borders of its star blocks into pieces, each of which sees
    the states of the anchor and its own block alone. Elsewhere a request is one piece.

    Attributes:
        request: (T,) int64, row of the batch.
        position: (T,) int64.
        piece: (T,) int64, row of the tables of the keys that are seen: ``request``, but where star cuts it.
        block_start: (T,) int64, where the token's star block starts; 0 where it sees all before it.
        anchor: (T,) int64, tokens before the star block whose states are seen, the first ones of all.
    """

    request: np.ndarray
    position: np.ndarray
    piece: np.ndarray
    block_start: np.ndarray
    anchor: np.ndarray

    def dense(self) -> Rows:
        """The same tokens, each of which sees all before it."""
        return Rows(self.request, self.position, self.request, *np.zeros((2, len(self.request)), dtype=np.int64))


def step_rows(query_lens: np.ndarray, seq_lens: np.ndarray) -> Rows:
    """The tokens of requests with so many tokens in this step, the last of so many in all; star apart."""
    request = np.repeat(np.arange(len(query_lens)), query_lens)
    first = np.cumsum(query_lens) - query_lens
    position = np.arange(len(request)) - first[request] + (seq_lens - query_lens)[request]
    return Rows(request, position, request, *np.zeros((2, len(request)), dtype=np.int64))


def star_rows(rows: Rows, virtual: VirtualRows) -> Rows:
    """The tokens of a step cut into pieces: the virtual rows of the cache of states."""
    piece = np.repeat(np.arange(len(virtual.source)), virtual.query_lens)
    end = rows.position[np.cumsum(virtual.query_lens) - 1] + 1
    own = np.where(virtual.star, end - virtual.block_start, virtual.seq_lens)
    return Rows(rows.request, rows.position, piece, virtual.block_start[piece], (virtual.seq_lens - own)[piece])


@dataclass(frozen=True)
class ChunkPlan:
    """What one layer does in a step. N chunks, of at most W tokens so far, have tokens in the step.

    Attributes:
        chunk_request: (N,) int64, row of the batch.
        chunk_position: (N, W) int64, positions of their tokens; past the last one in the step the last one again.
        token_chunk, token_place: (T,) int64, chunk and place in it of each token of the step.
        ends: (E,) int64, tokens of the step that end a chunk, token 0 among them.
        end_state: (E,) int64, number of the state that each makes; -1: token 0's own.
        stair_starts: (S + 1,) int32, first tokens of the S staircases of a piece, and T: of each the last P tokens see
            as many states, the P before these one fewer, and so on to none.
        stair_piece: (S,) int64.
        stair_states: (S,) int32, states that a staircase's last token sees.
        token_0_seen: (T,) bool, whether it sees token 0's own state.
    """

    chunk_request: np.ndarray
    chunk_position: np.ndarray
    token_chunk: np.ndarray
    token_place: np.ndarray
    ends: np.ndarray
    end_state: np.ndarray
    stair_starts: np.ndarray
    stair_piece: np.ndarray
    stair_states: np.ndarray
    token_0_seen: np.ndarray


def states_seen(rows: Rows, chunk: int, offset: int, window: int) -> np.ndarray:
    """(T,) number of chunk states that each token sees: those of its anchor, then those of its own star block.

    A boundary within the window is seen there, as the token it is. The window ends where the block starts, and state
    k lies in positions [k P, (k + 1) P) whatever the offset, so an anchor or a block of whole pages has whole states.
    """
    before_window = np.maximum(rows.block_start, rows.position - window + offset)
    return rows.anchor // chunk + before_window // chunk - rows.block_start // chunk


def sees_token_0(rows: Rows, chunk: int, offset: int, window: int) -> np.ndarray:
    """(T,) whether token 0 is seen as a state of its own: behind the window, and not boundary number 1 itself."""
    seen = np.where(rows.block_start > 0, rows.anchor > 0, rows.position > window)
    return seen & (offset != chunk - 1)


def keys_seen(rows: Rows, chunk: int, offset: int, window: int) -> np.ndarray:
    """(T,) keys that each token attends to in a layer: chunk states, token 0's own, and rows of the window."""
    near = np.minimum(window, rows.position - rows.block_start) + 1
    return states_seen(rows, chunk, offset, window) + sees_token_0(rows, chunk, offset, window) + near


def plan_step(rows: Rows, chunk: int, offset: int, window: int) -> ChunkPlan:
    """The plan of a layer with chunks of ``chunk`` tokens, its offset, and ``window`` tokens seen besides itself."""
    request, position = rows.request, rows.position
    start = chunk_start(position, chunk, offset)
    opens = _changes(request, start)
    last = np.append(opens[1:], len(request)) - 1
    width = int((position[last] - start[opens]).max()) + 1
    chunk_position = np.minimum(start[opens][:, None] + np.arange(width), position[last][:, None])

    natural = (position + 1 + offset) % chunk == 0
    ends = np.flatnonzero(natural | (position == 0))
    end_state = np.where(natural[ends], position[ends] // chunk, -1)

    stairs, stair_states = _staircases(rows.piece, states_seen(rows, chunk, offset, window), chunk)
    return ChunkPlan(
        chunk_request=request[opens],
        chunk_position=chunk_position,
        token_chunk=np.repeat(np.arange(len(opens)), last - opens + 1),
        token_place=position - start,
        ends=ends,
        end_state=end_state,
        stair_starts=np.append(stairs, len(request)).astype(np.int32),
        stair_piece=rows.piece[stairs],
        stair_states=stair_states.astype(np.int32),
        token_0_seen=sees_token_0(rows, chunk, offset, window),
    )


def _staircases(piece: np.ndarray, seen: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """First token of each staircase, and the states that its last token sees.

    Runs of tokens of a piece that see as many states, joined: a run of ``chunk`` tokens to one before that sees one
    fewer. Of a run that is longer, as at the start of a star block, no more than ``chunk`` tokens fit a step, unless
    they see none: there is no step below that.
    """
    runs = _changes(piece, seen)
    within = np.arange(len(piece)) - np.repeat(runs, np.diff(runs, append=len(piece)))
    runs = _changes(piece, seen, np.where(seen > 0, within // chunk, 0))
    states = seen[runs]
    joins = (np.diff(runs, append=len(piece))[1:] == chunk) & (np.diff(states) == 1) & (np.diff(piece[runs]) == 0)
    first = np.append(True, ~joins)
    return runs[first], states[np.append(first[1:], True)]


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Indices where a row differs from the one before, 0 among them."""
    differs = np.zeros(len(columns[0]), dtype=bool)
    differs[0] = True
    for column in columns:
        differs[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(differs)
