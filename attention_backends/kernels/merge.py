"""The exact merge of attention over disjoint parts of the keys, by log-sum-exp (arXiv 2501.01005, section 2.2)."""

from __future__ import annotations

import torch


def merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention over P disjoint sets of keys into the attention over their union.

    Args:
        outs: (P, T, H, D) partial outputs, or with other dimensions between the first and the last.
        lses: (P, T, H) log-sum-exps of the partial outputs, natural logarithm. A partial that saw no key has -inf, or
            +inf as FlashAttention returns it. Its out has no effect on the result, whatever its values.

    Returns:
        out (T, H, D) in outs' dtype, lse (T, H) in lses' dtype; 0 and -inf where every partial is empty.

    Raises:
        ValueError: the shapes do not fit each other, or P is 0.
    """
    if lses.shape != outs.shape[:-1] or not lses.dim() or not len(lses):
        raise ValueError(
            f"outs {tuple(outs.shape)} and lses {tuple(lses.shape)}: (P, ..., D) and (P, ...), P at least 1"
        )
    wide = torch.promote_types(torch.promote_types(outs.dtype, lses.dtype), torch.float32)
    empty = lses.isinf()
    logs = lses.to(wide).masked_fill(empty, float("-inf"))
    peak = logs.amax(0)
    weights = torch.exp(logs - peak.masked_fill(peak.isinf(), 0.0))
    total = weights.sum(0)
    parts = outs.to(wide).masked_fill(empty[..., None], 0.0)
    # The total is at least 1 where any partial has keys, so the clamp changes it only where all are empty.
    out = (parts * weights[..., None]).sum(0) / total.clamp_min(1.0)[..., None]
    return out.to(outs.dtype), (peak + torch.log(total)).masked_fill(total == 0, float("-inf")).to(lses.dtype)
