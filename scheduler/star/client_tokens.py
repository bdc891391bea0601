"""The prompt as its client sent it, and as the engine computes it: with padding behind each document of a star plan."""

from __future__ import annotations

import numpy as np

from starling.scheduler.star.plan import StarPlan


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
