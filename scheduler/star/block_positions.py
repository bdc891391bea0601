"""The star plan of a prompt whose blocks have positions of their own.

A block is a segment of the prompt (a document, a message) of any length. Its tokens are computed at the positions
behind the anchor, A, A + 1, ..., wherever the block stands in the prompt. So its KV depends on the anchor and on its
own tokens only, and one page serves every prompt that has the block, at any place.

The query and the output see true distances. Rotary embeddings are a group: the score of a query at position p and a
key whose token truly stands at g + j, but was computed at A + j, is that of the query turned back by g - A positions
(arXiv 2104.09864, section 3.4.2).

Each block starts on a KV page. Slots between the end of a block and its page's end hold padding: tokens that the engine
computes, which no token of the prompt sees and no position counts. The engine core adds this padding, so that a front
and its client see the prompt as the client sent it. What this module calls an index is a place in the prompt with
padding. vLLM's scheduler and workers call it a position, and find the KV page of a token by it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from starling.scheduler.star.plan import KeyRanges, StarPlan, count_pairs

FIELDS = 7
"""Fields that a StarPlan has on the wire."""


@dataclass(frozen=True)
class BlockKeys:
    """What query tokens see of a plan's blocks, one entry for each block; all in tokens.

    Attributes:
        starts: (N,) int64, index of the block's first token; on a page border.
        lengths: (N,) int64, tokens of the block.
        turns: (N,) int64, by how many positions the block's first token stands behind where it was computed.
    """

    starts: np.ndarray
    lengths: np.ndarray
    turns: np.ndarray

    def where(self, chosen: np.ndarray) -> BlockKeys:
        """Some of the blocks, given by (N,) bool."""
        return self if chosen.all() else BlockKeys(self.starts[chosen], self.lengths[chosen], self.turns[chosen])


@dataclass(frozen=True)
class BlockPositionsPlan(StarPlan):
    """A StarPlan whose positions, except for ``blocks``, are indexes of the prompt with padding.

    ``block_size`` is the longest block, ``anchor_size`` the whole pages of the head that each block sees.

    Attributes:
        blocks: index of the first token of each block, and the index behind its last. The first block is the head:
            the tokens before the first segment, which may be none.
        padding_token: fills the slots between blocks.
    """

    blocks: tuple[tuple[int, int], ...] = ()
    padding_token: int = 0

    @property
    def num_star_blocks(self) -> int:
        return len(self.blocks) - self._first

    @property
    def block_sizes(self) -> np.ndarray:
        return np.diff([*self._starts[self._first :], self.context_end]) / self.block_size

    def block_range(self, first: int, stop: int) -> tuple[int, int]:
        borders = [*self._starts[self._first :], self.context_end]
        return borders[first], borders[stop]

    @property
    def is_dense(self) -> bool:
        return False

    @property
    def head_end(self) -> int:
        return self.blocks[1][0]

    @property
    def _first(self) -> int:
        """0, or 1 where there is no head."""
        return int(not self.blocks[0][1])

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _ in self.blocks]

    @cached_property
    def _true_starts(self) -> list[int]:
        """Position of each block's first token in the prompt as the client sent it; last, that of the query's."""
        lengths = [stop - start for start, stop in self.blocks]
        return np.cumsum([0, *lengths]).tolist()

    @cached_property
    def _lengths_digest(self) -> str:
        """What the KV of the query depends on, beside the blocks' pages: where their tokens end."""
        return hashlib.sha256(repr(self.blocks).encode()).hexdigest()[:32]

    @property
    def num_context_tokens(self) -> int:
        """Tokens of the context, without padding."""
        return self._true_starts[-1]

    @property
    def num_client_tokens(self) -> int:
        """Tokens of the prompt as the client sent it."""
        return self.num_context_tokens + self.num_prompt_tokens - self.context_end

    def block_of(self, index: int) -> int:
        """The number of the block of an index of the context."""
        return bisect_right(self._starts, index) - 1

    def block_start(self, position: int) -> int:
        return self._starts[self.block_of(position)]

    def borders(self, first: int = 0) -> Iterable[int]:
        return (start for start in self._starts[1:] if start >= first)

    def page_key(self, start: int, end: int) -> str | None:
        if start < self.head_end:
            return None
        if end > self.context_end:
            return f"block:{self.anchor_size}:{self._lengths_digest}"
        return f"block:{self.anchor_size}:{start - self.block_start(start)}"

    def place_in_key(self, position: int) -> int | None:
        return None

    def key_ranges(self, star_block: int, end: int) -> KeyRanges:
        start, anchor = self._starts[star_block], self.anchor_size
        if star_block == 0 or anchor == start:
            return ((0, end),)
        return ((0, anchor), (start, end)) if anchor else ((start, end),)

    def split(self, start: int, end: int) -> Iterator[tuple[int, int, KeyRanges]]:
        """As StarPlan.split. What a piece behind the context sees of the context is in ``block_keys`` instead."""
        while start < end:
            if start >= self.context_end:
                yield start, end, ((self.context_end, end),)
                return
            block = self.block_of(start)
            stop = min(self._starts[block + 1] if block + 1 < len(self.blocks) else self.context_end, end)
            yield start, stop, self.key_ranges(block, stop)
            start = stop

    @cached_property
    def block_keys(self) -> BlockKeys:
        """The keys of the context, as the query and the output see them."""
        blocks = np.asarray(self.blocks[self._first :], dtype=np.int64)
        turns = np.asarray(self._true_starts[self._first : -1], dtype=np.int64)
        turns[1 - self._first :] -= self.anchor_size
        return BlockKeys(blocks[:, 0], blocks[:, 1] - blocks[:, 0], turns)

    def positions(self, start: int, end: int) -> np.ndarray:
        """(end - start,) int64: the position at which each index of ``[start, end)`` is computed."""
        index = np.arange(start, end, dtype=np.int64)
        block = np.searchsorted(self._starts, index, side="right") - 1
        own = index - np.asarray(self._starts)[block] + np.where(block > 0, self.anchor_size, 0)
        return np.where(index < self.context_end, own, index - self.context_end + self.num_context_tokens)

    def blocks_done(self, num_computed_tokens: int) -> int:
        if num_computed_tokens >= self.context_end:
            return self.num_star_blocks
        return max(self.block_of(num_computed_tokens) - self._first, 0)

    def pad(self, token_ids: list[int]) -> list[int]:
        """The client's prompt as the engine computes it."""
        padded: list[int] = []
        for (start, stop), first in zip(self.blocks, self._true_starts, strict=False):
            padded += [self.padding_token] * (start - len(padded))
            padded += token_ids[first : first + stop - start]
        padded += [self.padding_token] * (self.context_end - len(padded))
        return padded + token_ids[self.num_context_tokens :]

    def client_indexes(self) -> np.ndarray:
        """(num_client_tokens,) int64: the index of each token of the client's prompt."""
        own = [np.arange(start, stop) for start, stop in (*self.blocks, (self.context_end, self.num_prompt_tokens))]
        return np.concatenate(own)

    def client_index(self, index: int) -> int:
        """How many tokens of the client's prompt are before an index."""
        if index >= self.context_end:
            return index - self.context_end + self.num_context_tokens
        block = self.block_of(index)
        start, stop = self.blocks[block]
        return self._true_starts[block] + min(index, stop) - start

    def keys_attended(self) -> int:
        queries = self.num_prompt_tokens - self.context_end
        return self._context_pairs() + count_pairs(queries, ((0, self.num_client_tokens),))

    def dense_keys(self) -> int:
        return self.num_client_tokens * (self.num_client_tokens + 1) // 2

    def context_keys_per_token(self) -> float:
        return self._context_pairs() / max(self.num_context_tokens, 1)

    def _context_pairs(self) -> int:
        lengths = [stop - start for start, stop in self.blocks]
        return count_pairs(lengths[0], ((0, lengths[0]),)) + sum(
            count_pairs(length, ((0, self.anchor_size + length),)) for length in lengths[1:]
        )

    def to_wire(self) -> list[Any]:
        return [*super().to_wire()[:FIELDS], [list(block) for block in self.blocks], self.padding_token]

    def summary(self) -> dict[str, Any]:
        own = {"context_end": self.num_context_tokens, "prompt_tokens": self.num_client_tokens, "positions": "block"}
        return super().summary() | own | {"padding_tokens": self.num_prompt_tokens - self.num_client_tokens}


def plan_from_wire(wire: list[Any]) -> StarPlan:
    """The plan that ``to_wire`` gave."""
    plan = StarPlan(*wire[:FIELDS])
    if len(wire) == FIELDS:
        return plan
    blocks, padding_token = wire[FIELDS:]
    pairs = tuple((start, stop) for start, stop in blocks)
    return BlockPositionsPlan(**vars(plan), blocks=pairs, padding_token=padding_token)
