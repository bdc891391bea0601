"""The star plan of one prompt: a list of blocks, made once, and what a response shows of it.

A block has a start and an end in the engine's prompt, the position at which its first token is computed, and ranges
that its tokens see beside themselves. There are two kinds of plan:

- Blocks of one size. Each token is computed at its place in the prompt. With an overlap, a block sees the end of the
  block before it.
- Documents: blocks of any length. The tokens of a block are computed at the positions behind the anchor, A, A + 1, ...,
  wherever the block stands. So its KV depends on the anchor and on its own tokens alone, and one page serves every
  prompt that has the block. The query and the output see true distances: rotary embeddings are a group, so the score of
  a query at position p and a key whose token truly stands at g + j, but was computed at A + j, is that of the query
  rotated back by g - A positions (arXiv 2104.09864, section 3.4.2).

Each document starts on a KV page. Slots between its end and its page's end hold padding: tokens that the engine
computes, which no token of the prompt sees and no position counts. The engine core adds them (``pad``).
So a place in the engine's prompt is called an index here. vLLM's scheduler and workers call it a position, and find the
KV page of a token by it.

Example:
    A prompt of ten tokens with two star blocks of four, an anchor of two, and a query of two. ``split`` yields spans of
    tokens, and the ranges of keys that the last one of each sees:

    >>> plan = StarPlan(block_size=4, anchor_size=2, overlap_size=0, context_end=8, num_prompt_tokens=10)
    >>> list(plan.split(0, 10))
    [(0, 4, ((0, 4),)), (4, 8, ((0, 2), (4, 8))), (8, 10, ((0, 10),))]

    The same ten tokens as a head of two, two documents of three, and a query of two, with pages of two tokens. A token
    of padding stands behind each document, and both documents are computed at the positions behind the head:

    >>> from starling.scheduler.planning.documents import cut, lay_out
    >>> documents, context_end = lay_out(cut([2, 5], context_end=8, block_size=4), page_size=2)
    >>> documents, context_end
    (((0, 2), (2, 5), (6, 9)), 10)
    >>> plan = StarPlan(4, 2, 0, context_end, context_end + 2, documents=documents)
    >>> pad(plan, list(range(10)))
    [0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 8, 9]
    >>> plan.positions(0, 12).tolist()
    [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 8, 9]

    The query meets the second document, which truly begins at position 5, rotated back by three:

    >>> plan.document_keys.starts.tolist(), plan.document_keys.rotate_by.tolist()
    ([0, 2, 6], [0, 0, 3])
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

KeyRanges = tuple[tuple[int, int], ...]
"""Half-open ranges of indexes, ascending and disjoint; every start is page-aligned."""


class Block(NamedTuple):
    """A star block.

    Attributes:
        start: index of its first token, on a page border.
        end: index behind its last token.
        position: at which its first token is computed; its other tokens follow.
        sees: what its tokens see of the prompt before ``start``.
    """

    start: int
    end: int
    position: int
    sees: KeyRanges


@dataclass(frozen=True)
class DocumentKeys:
    """Documents as the query sees them, one entry for each; all in tokens.

    Attributes:
        starts: (N,) int64, index of the first token; on a page border.
        lengths: (N,) int64, tokens.
        rotate_by: (N,) int64, by how many positions the first token truly stands behind where it was computed.
    """

    starts: np.ndarray
    lengths: np.ndarray
    rotate_by: np.ndarray

    def where(self, chosen: np.ndarray) -> DocumentKeys:
        """Select documents by (N,) bool."""
        return self if chosen.all() else DocumentKeys(self.starts[chosen], self.lengths[chosen], self.rotate_by[chosen])


@dataclass(frozen=True)
class DenseHeads:
    """KV heads that see everything before them in every block; the others see star blocks.

    Attributes:
        count: how many they are: those with the highest scores (config/head_scores.py).
        total: KV heads of all layers with scores.
        digest: which they are.
    """

    count: int
    total: int
    digest: str

    @property
    def share(self) -> float:
        return self.count / self.total


@dataclass(frozen=True)
class StarPlan:
    """Plan of one prompt's prefill (arXiv 2411.17116, section 2); sizes in tokens, places are indexes.

    Indexes below ``context_end`` are the context, which is cut into blocks. The query and the generated tokens behind
    it attend to the whole context. The blocks are split over up to ``replicas`` engine replicas, which does not change
    what is computed. With ``shards`` the KV of the blocks stays on these replicas, and later tokens attend on each of
    them.

    Attributes:
        block_size: of blocks of one size; else no block is longer.
        anchor_size: the first tokens of the prompt that every block sees.
        overlap_size: tokens of the block before it that a block sees; 0 with documents.
        num_prompt_tokens: of the engine's prompt.
        documents: start and end of each block, where blocks are documents; else none. With an anchor the first block is
            the head, the tokens before the first document.
        padding_token: fills the slots between documents.
        adapter: the digest of the server's adapter with which the prompt runs; empty: with the base model, or with a
            LoRA that its request names.
        dense_heads: heads that see the whole prompt before them, or None. With them, the KV of a block depends on
            everything before it. Blocks, and what they see, are those of the other heads.
    """

    block_size: int
    anchor_size: int
    overlap_size: int
    context_end: int
    num_prompt_tokens: int
    replicas: int = 1
    shards: bool = False
    documents: tuple[tuple[int, int], ...] = ()
    padding_token: int = 0
    adapter: str = ""
    dense_heads: DenseHeads | None = None

    @property
    def is_independent(self) -> bool:
        """Return whether the KV of a block depends on the anchor and on its own tokens alone."""
        return not self.overlap_size and self.dense_heads is None

    @cached_property
    def starts(self) -> Sequence[int]:
        """The start of each block."""
        if self.documents:
            return [start for start, _ in self.documents]
        return range(0, self.context_end, self.block_size)

    def block(self, number: int) -> Block:
        """Return the block of a number, counted from 0."""
        start = self.starts[number]
        if self.documents:
            end, near = self.documents[number][1], start
        else:
            end, near = min(start + self.block_size, self.context_end), max(0, start - self.overlap_size)
        if start < self.head_end or not start:
            return Block(start, end, start, ())
        position = self.anchor_size if self.documents else start
        if near <= self.anchor_size:
            return Block(start, end, position, ((0, start),))
        sees = ((0, self.anchor_size), (near, start))
        return Block(start, end, position, tuple((first, stop) for first, stop in sees if first < stop))

    def block_of(self, index: int) -> int:
        """Return the number of the block of an index of the context."""
        return bisect_right(self.starts, index) - 1

    @property
    def head_end(self) -> int:
        """Before this index, KV is that of dense attention."""
        if not self.documents:
            return self.block_size
        return self.documents[1][0] if self.anchor_size else 0

    @property
    def documents_behind_head(self) -> tuple[tuple[int, int], ...]:
        """Start and end of each document without the head; none where blocks are no documents."""
        return tuple(span for span in self.documents if span[0] >= self.head_end)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(number of blocks,) int64: the tokens of each block."""
        if self.documents:
            return np.asarray([end - start for start, end in self.documents], dtype=np.int64)
        starts = np.arange(0, self.context_end, self.block_size, dtype=np.int64)
        return np.minimum(self.block_size, self.context_end - starts)

    @cached_property
    def client_starts(self) -> list[int]:
        """Index of each block's first token in the prompt as the client sent it; last, that of the query's."""
        return [0, *np.cumsum(self.lengths).tolist()]

    def split(self, start: int, end: int) -> Iterator[tuple[int, int, KeyRanges]]:
        """Cut the query indexes ``[start, end)`` at block borders: (start, end, keys of the last one).

        Within one piece, the token at an index sees the same ranges cut off behind the index: causal attention
        aligned bottom-right over the concatenated ranges. What a piece behind documents sees of them is not in its
        keys, but in ``document_keys``.
        """
        while start < end:
            if start >= self.context_end:
                yield start, end, (((self.context_end if self.documents else 0), end),)
                return
            number = self.block_of(start)
            block = self.block(number)
            stop = min(self.starts[number + 1] if number + 1 < len(self.starts) else self.context_end, end)
            if block.sees and block.sees[-1][1] == block.start:
                keys = (*block.sees[:-1], (block.sees[-1][0], stop))
            else:
                keys = (*block.sees, (block.start, stop))
            yield start, stop, keys
            start = stop

    @cached_property
    def document_keys(self) -> DocumentKeys | None:
        """The documents as the query and the output see them; None: they see the context as it stands."""
        if not self.documents:
            return None
        rotate_by = np.asarray(self.client_starts[:-1], dtype=np.int64)
        rotate_by[1:] -= self.anchor_size  # the first block is the head, or there is no anchor
        return DocumentKeys(np.asarray(self.starts, dtype=np.int64), self.lengths, rotate_by)

    def positions(self, start: int, end: int) -> np.ndarray | None:
        """(end - start,) int64: the position at which each index of ``[start, end)`` is computed; None: the index."""
        if not self.documents:
            return None
        index = np.arange(start, end, dtype=np.int64)
        block = np.searchsorted(self.starts, index, side="right") - 1
        own = index - np.asarray(self.starts)[block] + np.where(block > 0, self.anchor_size, 0)
        return np.where(index < self.context_end, own, index - self.context_end + self.client_starts[-1])

    def shifts(self, start: int, end: int) -> np.ndarray | int:
        """Return position minus index for each index of ``[start, end)``: (end - start,), or one for all."""
        if self.documents and start >= self.context_end:
            return self.client_starts[-1] - self.context_end
        positions = self.positions(start, end)
        return 0 if positions is None else positions - np.arange(start, end)

    def page_key(self, start: int, end: int) -> str | None:
        """Return the key of what KV of ``[start, end)`` depends on beside its tokens and the pages before.

        None: on nothing, as under dense attention.
        """
        if start < self.head_end:
            return None
        if not self.documents:
            key = f"{self.block_size}:{self.anchor_size}:{self.overlap_size}"
            if self.dense_heads is not None:
                key += f":heads-{self.dense_heads.digest}"
            return key if end <= self.context_end else f"{key}:{self.context_end}"
        if end > self.context_end:
            return f"block:{self.anchor_size}:{self._documents_digest}"
        return f"block:{self.anchor_size}:{start - self.starts[self.block_of(start)]}"

    @cached_property
    def _documents_digest(self) -> str:
        """Digest what the query's KV depends on beside the documents' pages: where their tokens end."""
        return hashlib.sha256(repr(self.documents).encode()).hexdigest()[:32]


def count_pairs(num_queries: int, keys: KeyRanges) -> int:
    """Query-key pairs of a causal piece of ``num_queries`` tokens whose last one sees all ``keys``."""
    length = sum(stop - start for start, stop in keys)
    return num_queries * length - num_queries * (num_queries - 1) // 2


def pad(plan: StarPlan, token_ids: list[int]) -> list[int]:
    """Return the client's prompt as the engine computes it, the same list if the plan has no documents."""
    if not plan.documents:
        return token_ids
    padded: list[int] = []
    for (start, end), first in zip(plan.documents, plan.client_starts, strict=False):
        padded += [plan.padding_token] * (start - len(padded))
        padded += token_ids[first : first + end - start]
    padded += [plan.padding_token] * (plan.context_end - len(padded))
    return padded + token_ids[plan.client_starts[-1] :]


def client_indexes(plan: StarPlan) -> np.ndarray:
    """(client tokens,) int64: the index of each token of the client's prompt."""
    blocks = [(start, start + int(length)) for start, length in zip(plan.starts, plan.lengths, strict=True)]
    return np.concatenate([np.arange(*span) for span in (*blocks, (plan.context_end, plan.num_prompt_tokens))])


def client_index(plan: StarPlan, index: int) -> int:
    """Count the tokens of the client's prompt before an index."""
    if index >= plan.context_end:
        return index - plan.context_end + plan.client_starts[-1]
    number = plan.block_of(index)
    start, end = plan.block(number)[:2]
    return plan.client_starts[number] + min(index, end) - start


def blocks_done(plan: StarPlan, num_computed_tokens: int) -> int:
    """Star blocks whose context tokens are all computed; the last one may be shorter than B."""
    return len(plan.starts) if num_computed_tokens >= plan.context_end else plan.block_of(num_computed_tokens)


def block_range(plan: StarPlan, first: int, stop: int) -> tuple[int, int]:
    """Return the indexes [start, end) of star blocks ``first`` to ``stop - 1``, padding included."""
    return plan.starts[first], plan.starts[stop] if stop < len(plan.starts) else plan.context_end


def work(plan: StarPlan) -> np.ndarray:
    """Return the memory, and about the work, of each block: (blocks,) float64, 1 for ``block_size`` tokens.

    A last block of one size counts as a whole one.
    """
    if not plan.documents:
        return np.ones(len(plan.starts))
    return np.diff([*plan.starts, plan.context_end]) / plan.block_size


def num_context_tokens(plan: StarPlan) -> int:
    """Tokens of the context as the client sent it."""
    return plan.client_starts[-1] if plan.documents else plan.context_end


def num_client_tokens(plan: StarPlan) -> int:
    """Tokens of the prompt as the client sent it."""
    return num_context_tokens(plan) + plan.num_prompt_tokens - plan.context_end


def context_pairs(plan: StarPlan) -> int:
    """Query-key pairs of the context, per head and layer; with dense heads a mean of both kinds.

    Blocks behind the first few see equally many tokens before them, so only these few are looked at one by one.
    """
    few = min((plan.anchor_size + plan.overlap_size) // plan.block_size + 2, len(plan.starts))
    seen = np.zeros_like(plan.lengths)
    for number in range(few):
        seen[number:] = sum(stop - start for start, stop in plan.block(number).sees)
    pairs = int((plan.lengths * seen + plan.lengths * (plan.lengths + 1) // 2).sum())
    return mean_pairs(plan, pairs, dense_keys(int(plan.lengths.sum())))


def mean_pairs(plan: StarPlan, star: int, dense: int) -> int:
    """Query-key pairs of a head on average, of which some see star blocks and some everything."""
    share = 0.0 if plan.dense_heads is None else plan.dense_heads.share
    return round((1 - share) * star + share * dense) if share else star


def keys_attended(plan: StarPlan) -> int:
    """Query-key pairs of the whole prompt, per head and layer."""
    queries = plan.num_prompt_tokens - plan.context_end
    return context_pairs(plan) + count_pairs(queries, ((0, num_client_tokens(plan)),))


def dense_keys(num_tokens: int) -> int:
    """Query-key pairs of a prompt under dense causal prefill."""
    return num_tokens * (num_tokens + 1) // 2


def summary(plan: StarPlan) -> dict[str, Any]:
    """Return the plan as a response shows it, without padding: its sizes, and the attended keys."""
    context, tokens = num_context_tokens(plan), num_client_tokens(plan)
    in_context = context_pairs(plan)
    return {
        "attention": "star",
        "star_blocks": len(plan.starts),
        "block_size": plan.block_size,
        "anchor_size": plan.anchor_size,
        "overlap_size": plan.overlap_size,
        "context_end": context,
        "prompt_tokens": tokens,
        "replicas": plan.replicas,
        "shards": plan.shards,
        "dense_heads": 0.0 if plan.dense_heads is None else round(plan.dense_heads.share, 4),
        "kv_heads": 0 if plan.dense_heads is None else plan.dense_heads.total,
        "documents": bool(plan.documents),
        "adapter": bool(plan.adapter),
        "padding_tokens": plan.num_prompt_tokens - tokens,
        "keys_attended": in_context + count_pairs(tokens - context, ((0, tokens),)),
        "dense_keys": dense_keys(tokens),
        "keys_per_context_token": round(in_context / max(context, 1), 1),
    }


def describe(
    plan: StarPlan | None, num_prompt_tokens: int, model: Any = None, why: str | None = None
) -> dict[str, Any]:
    """Describe the plan, or that the prompt runs dense, as a response and the live page show it.

    Args:
        model: the text model's configuration. Where it has ``prompt_keys``, that counts the attended keys.
        why: as a Decision has it.
    """
    dense: dict[str, Any] = {"attention": "dense", "prompt_tokens": num_prompt_tokens}
    shown = (dense if plan is None else summary(plan)) | (model_keys(plan, num_prompt_tokens, model) or {})
    return shown if why is None else shown | {"why": why}


def model_keys(plan: StarPlan | None, num_prompt_tokens: int, model: Any) -> dict[str, Any] | None:
    """Return the attended keys of a model that counts them itself, or None if the plan's own counts hold.

    Args:
        model: the text model's configuration. Where it has ``prompt_keys``, that counts the attended keys.
    """
    count_keys = getattr(model, "prompt_keys", None)
    return count_keys(plan, num_prompt_tokens) if count_keys else None
