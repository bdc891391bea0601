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


def merge_parts(parts: torch.Tensor, part_lses: torch.Tensor, tokens: torch.Tensor, out: torch.Tensor) -> None:
    """Merge attention over disjoint keys into the attention of each token, on a CPU.

    Args:
        parts: (P, H, D) partial outputs, contiguous.
        part_lses: (P, H) their log-sum-exps, contiguous. Each token has a part with keys.
        tokens: (P,) int64, the token that each part is of.
        out: (T, H, D) to write to, the last dimension contiguous.
    """
    peak = _raised(part_lses.new_full(out.shape[:2], float("-inf")), tokens, part_lses)
    total, merged = torch.zeros_like(peak), part_lses.new_zeros(out.shape)
    _add_parts(merged, total, peak, tokens, parts, part_lses)
    out.copy_(merged.div_(total[..., None]))


def merge_rows(
    out: torch.Tensor, lse: torch.Tensor, tokens: torch.Tensor, parts: torch.Tensor, part_lses: torch.Tensor
) -> None:
    """Merge attention over further, disjoint keys into that of some tokens, in place, on a CPU.

    Args:
        out: (T, H, D) float32, the last dimension contiguous.
        lse: (T, H) float32, contiguous; -inf where no key was seen.
        tokens: (P,) int64, the token that each part is of.
        parts: (P, H, D) partial outputs, contiguous.
        part_lses: (P, H) their log-sum-exps, contiguous.
    """
    peak = _raised(lse, tokens, part_lses)
    safe = peak.masked_fill(peak.isinf(), 0.0)
    total = torch.exp(lse - safe)
    out.mul_(total[..., None])
    _add_parts(out, total, safe, tokens, parts, part_lses)
    out.div_(total.clamp_min(torch.finfo(total.dtype).tiny)[..., None])
    lse.copy_(torch.where(total > 0, safe + torch.log(total), float("-inf")))


def _raised(lse: torch.Tensor, tokens: torch.Tensor, part_lses: torch.Tensor) -> torch.Tensor:
    """(T, H): the largest log-sum-exp of each token, that of ``lse`` included."""
    return lse.scatter_reduce(0, tokens[:, None].expand_as(part_lses), part_lses, "amax")


def _add_parts(
    out: torch.Tensor,
    total: torch.Tensor,
    peak: torch.Tensor,
    tokens: torch.Tensor,
    parts: torch.Tensor,
    part_lses: torch.Tensor,
) -> None:
    """Add parts to the weighted sums ``out`` (T, H, D) and ``total`` (T, H) of their tokens, in place.

    For a CPU, where ``index_add_`` adds in the order of the parts.

    Args:
        peak: (T, H) finite; the weight of a part is exp(its log-sum-exp - peak).
    """
    weights = torch.exp(part_lses - peak[tokens])
    total.index_add_(0, tokens, weights)
    out.index_add_(0, tokens, parts.float() * weights[..., None])
