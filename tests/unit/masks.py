"""The explicit mask of a plan."""

import torch

from starling.lab.selftest.masks import star_mask
from starling.scheduler.planning.plan import StarPlan


def mask_of(plan: StarPlan, num_tokens: int) -> torch.Tensor:
    """(num_tokens, num_tokens) bool: whether the query at the row may see the key at the column."""
    return star_mask(
        num_tokens,
        block_size=plan.block_size,
        anchor_size=plan.anchor_size,
        overlap_size=plan.overlap_size,
        context_end=plan.context_end,
    )
