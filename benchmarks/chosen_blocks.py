"""Masks of block-sparse prefill whose blocks each head chooses by content, for benchmarks/approximations.py.

A head sees the diagonal, the first block of keys, and as many other blocks as the budget of query-key pairs has room
for: those with the highest score. XAttention (arXiv 2503.16428) scores a block by the sums of its antidiagonals, which
a server can compute; an oracle scores it by the attention itself, which it can't.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

SIZE, STRIDE, CHUNK = 64, 8, 512
"""Tokens of a block's side, of the antidiagonals of which it is summed up, and of the queries taken at once."""

Scores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(n, D) queries and keys of a head -> (n / SIZE, n / SIZE) scores of blocks; those above the diagonal do not count."""


def antidiagonals(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return XAttention's scores.

    They are the sum of the antidiagonal of each STRIDE x STRIDE square, as a probability of its row.
    """
    rows = query.unflatten(0, (-1, STRIDE)).flatten(1)
    columns = key.unflatten(0, (-1, STRIDE)).flip(1).flatten(1)
    sums = rows @ columns.T / (math.sqrt(query.shape[1]) * STRIDE)
    sums = sums.masked_fill(torch.ones_like(sums, dtype=torch.bool).triu(1), -math.inf)
    return in_blocks(sums.softmax(-1), SIZE // STRIDE)


def attention(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return the attention that the queries of a block pay to the keys of another one."""
    sums = torch.zeros(len(query) // SIZE, len(key) // SIZE)
    for start in range(0, len(query), CHUNK):
        end = min(start + CHUNK, len(query))
        scores = query[start:end] @ key[:end].T / math.sqrt(query.shape[1])
        scores[:, start:].masked_fill_(torch.ones(end - start, end - start, dtype=torch.bool).triu(1), -math.inf)
        sums[start // SIZE : end // SIZE, : end // SIZE] = in_blocks(scores.softmax(-1), SIZE)
    return sums


def in_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """Sum a matrix over squares of a size."""
    return values.unflatten(1, (-1, size)).sum(2).unflatten(0, (-1, size)).sum(1)


def choose(scores: torch.Tensor, budget: float) -> torch.Tensor:
    """Return (blocks, blocks) bool: which blocks a head sees, with at most ``budget`` query-key pairs."""
    number = len(scores)
    seen = torch.eye(number, dtype=torch.bool)
    seen[:, 0] = True
    others = torch.ones(number, number, dtype=torch.bool).tril(-1) & ~seen
    pairs = number * SIZE * (SIZE + 1) // 2 + (number - 1) * SIZE**2
    room = min(int((budget - pairs) // SIZE**2), int(others.sum()))
    best = scores.masked_fill(~others, -1).flatten().topk(max(room, 0)).indices
    seen.view(-1)[best] = True
    return seen


def mask_of(score: Scores, budget: float) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a mask of approximations.py: (layer, queries, keys) -> (H, n, n) bool."""

    def mask(layer: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        heads = [
            choose(score(query[0, head].float(), key[0, head // groups].float()), budget)
            for head in range(query.shape[1])
        ]
        blocks = torch.stack(heads)
        return blocks.repeat_interleave(SIZE, 1).repeat_interleave(SIZE, 2) & causal

    return mask
