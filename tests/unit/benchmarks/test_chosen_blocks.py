"""Block-sparse prefill whose blocks are chosen by content, as benchmarks/approximations.py compares it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.chosen_blocks import SIZE, antidiagonals, attention, choose, mask_of

NUMBER, DIM = 8, 16
TOKENS = NUMBER * SIZE


@pytest.mark.parametrize("score", [antidiagonals, attention])
def test_a_head_sees_the_diagonal_the_first_block_and_the_block_that_its_queries_look_for(score):
    """Queries of block 6 look for the keys of block 2, and those of the second head for block 3."""
    query, key = torch.zeros(1, 2, TOKENS, DIM), torch.zeros(1, 1, TOKENS, DIM)
    for head, block in enumerate((2, 3)):
        query[0, head, 6 * SIZE : 7 * SIZE, head] = 10
        key[0, 0, block * SIZE : (block + 1) * SIZE, head] = 10
    least = NUMBER * SIZE * (SIZE + 1) // 2 + (NUMBER - 1) * SIZE**2
    mask = mask_of(score, least + SIZE**2)(0, query, key)
    for head, block in enumerate((2, 3)):
        expected = torch.eye(NUMBER, dtype=torch.bool)
        expected[:, 0] = expected[6, block] = True
        causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        assert torch.equal(mask[head], expected.repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1) & causal)
    assert (mask.sum((1, 2)) == least + SIZE**2).all()


def test_all_blocks_are_seen_where_the_budget_has_room():
    scores = torch.rand(NUMBER, NUMBER, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(scores, TOKENS**2), torch.ones(NUMBER, NUMBER, dtype=torch.bool).tril())
