"""Chunk boundaries in closed form, and the plan of one Attamba layer for one step. Pure functions.

Token 0 is a chunk of its own. A layer cuts the tokens after token 0 at boundaries k P - 1 - offset, k = 1, 2, ...
A boundary is the last token of its chunk, and the chunk's state has the number k - 1. Source: Attamba paper
(arXiv 2411.17685), section 3. The offsets are the "cyclic" offsets of the paper.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from starling.scheduler.planning.plan import StarPlan

if TYPE_CHECKING:
    from starling.attention_backends.star.rows import VirtualRows


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

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """request, position, piece, block_start and anchor, as tensors of the same memory."""
        arrays = (self.request, self.position, self.piece, self.block_start, self.anchor)
        return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)

    def dense(self) -> StepTokens:
        """Return the same tokens under dense attention: each token sees all tokens before it."""
        return StepTokens(self.request, self.position, self.request, *np.zeros((2, len(self.request)), dtype=np.int64))


def dense_tokens(query_lens: np.ndarray, seq_lens: np.ndarray) -> StepTokens:
    """Return the tokens of a step under dense attention.

    Args:
        query_lens: (R,) int64, tokens of each request in this step.
        seq_lens: (R,) int64, tokens of each request so far, including this step.
    """
    request = np.repeat(np.arange(len(query_lens)), query_lens)
    first = np.cumsum(query_lens) - query_lens
    position = np.arange(len(request)) - first[request] + (seq_lens - query_lens)[request]
    return StepTokens(request, position, request, *np.zeros((2, len(request)), dtype=np.int64))


def profiled_tokens(num_tokens: int, chunk_size: int, offset: int, window: int, max_rows: int) -> StepTokens:
    """Return a step of ``num_tokens`` tokens with the highest memory use, for vLLM's memory profiling.

    The chunks have ``max_rows`` rows or more if ``num_tokens`` tokens can lie in so many. The first request has many
    tokens. Each of the others has one, in the last place of a chunk: such a chunk has the most rows for a token. All
    tokens see the state of token 0.

    Args:
        num_tokens: number of tokens, at least 1.
        chunk_size, offset, window: see ``plan_step``.
        max_rows: maximum rows of a group of chunks, see ``mix.GROUP_ROWS``.
    """
    others = min(num_tokens - 1, max(0, -(-(max_rows - num_tokens) // chunk_size)))
    query_lens = np.array([num_tokens - others] + [1] * others)
    first = ((window + offset) // chunk_size + 2) * chunk_size - 1 - offset
    return dense_tokens(query_lens, first + query_lens)


def star_tokens(tokens: StepTokens, virtual: VirtualRows) -> StepTokens:
    """Cut the tokens into pieces, one for each virtual row of the cache of states."""
    piece = np.repeat(np.arange(len(virtual.source)), virtual.query_lens)
    end = tokens.position[np.cumsum(virtual.query_lens) - 1] + 1
    own = np.where(virtual.star, end - virtual.block_start, virtual.seq_lens)
    return StepTokens(
        tokens.request, tokens.position, piece, virtual.block_start[piece], (virtual.seq_lens - own)[piece]
    )


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """The work of one layer in one step, as tensors on the host or, from ``to``, on a device.

    N chunks have tokens in the step.

    Attributes:
        chunk_request: (N,) int64, row of the batch.
        chunk_start: (N,) int64, position of each chunk's first token.
        chunk_rows: (N,) int64, tokens of each chunk so far, those of the step included.
        chunk_tokens: (N + 1,) int64, first token of the step in each chunk, then T.
        ends: (E,) int64, tokens of the step that end a chunk, including token 0.
        end_state: (E,) int64, number of the state that each end makes; -1 for the state of token 0.
        stair_starts: (S + 1,) int32, first token of each of S staircases, then T. A staircase lies in one piece. Its
            last P tokens see equally many states, the P tokens before those see one state fewer, and so on down to 0.
        stair_piece: (S,) int64, piece of each staircase.
        stair_states: (S,) int32, states that the last token of each staircase sees.
        token_0_seen: (T,) bool, whether the token sees the state of token 0.
        copies: of the plan, by device.
    """

    chunk_request: torch.Tensor
    chunk_start: torch.Tensor
    chunk_rows: torch.Tensor
    chunk_tokens: torch.Tensor
    ends: torch.Tensor
    end_state: torch.Tensor
    stair_starts: torch.Tensor
    stair_piece: torch.Tensor
    stair_states: torch.Tensor
    token_0_seen: torch.Tensor
    copies: dict[torch.device, OnDevice] = field(default_factory=dict, init=False)

    @property
    def of_mixers(self) -> tuple[torch.Tensor, ...]:
        """Return the arguments of the mixers' C++ op."""
        return self.chunk_request, self.chunk_start, self.chunk_rows, self.chunk_tokens

    @property
    def of_attention(self) -> tuple[torch.Tensor, ...]:
        """Return the arguments of the attention's C++ op."""
        stairs = self.stair_starts, self.stair_piece, self.stair_states
        return self.ends, self.end_state, *stairs, self.token_0_seen

    def to(self, device: torch.device) -> OnDevice:
        """Return the host's plan on a device, copied once for all layers with this plan."""
        if device not in self.copies:
            is_chunk = self.end_state >= 0  # selected on the host: a selection on a device waits for the device
            made = self.ends[is_chunk], self.end_state[is_chunk], self.ends[~is_chunk]
            tensors = (*self.of_mixers, *self.of_attention, *made)
            *planned, ends, states, first = (async_tensor_h2d(tensor, device) for tensor in tensors)
            self.copies[device] = OnDevice(ChunkPlan(*planned), StatesMade(ends, states, first))
        return self.copies[device]


class StatesMade(NamedTuple):
    """The states that a step makes.

    Attributes:
        ends, numbers: (E,) int64, the tokens that end a chunk, and the numbers of their states.
        first: (F,) int64, the tokens 0, whose state has no number.
    """

    ends: torch.Tensor
    numbers: torch.Tensor
    first: torch.Tensor


class OnDevice(NamedTuple):
    """A plan on a device."""

    plan: ChunkPlan
    states: StatesMade


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
    """Plan one layer for one step, in numpy. kernels/cpu/chunks.h has the same in C++.

    Args:
        tokens: the tokens of the step, at least one.
        chunk_size: P, tokens of a chunk.
        offset: of the layer, see ``layer_offset``.
        window: L, tokens that a token sees one by one besides itself.
    """
    request, position = tokens.request, tokens.position
    start = chunk_start(position, chunk_size, offset)
    opens = _run_starts(request, start)
    chunk_tokens = np.append(opens, len(request))

    is_boundary = (position + 1 + offset) % chunk_size == 0
    ends = np.flatnonzero(is_boundary | (position == 0))

    stairs, stair_states = _staircases(tokens.piece, num_states_seen(tokens, chunk_size, offset, window), chunk_size)
    arrays = (
        request[opens],
        start[opens],
        position[chunk_tokens[1:] - 1] - start[opens] + 1,
        chunk_tokens,
        ends,
        np.where(is_boundary[ends], position[ends] // chunk_size, -1),
        np.append(stairs, len(request)).astype(np.int32),
        tokens.piece[stairs],
        stair_states.astype(np.int32),
        sees_token_0(tokens, chunk_size, offset, window),
    )
    return ChunkPlan(*map(torch.from_numpy, arrays))


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
