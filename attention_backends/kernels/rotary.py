"""Queries that are turned back by their rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Rotation:
    """A layer's rotary embedding, as far as turning a query takes it.

    Attributes:
        cos, sin: (positions, R / 2) float32, of the angles by which a position turns the first R elements of a head.
        is_neox_style: whether elements i and i + R / 2 are a pair, else 2 i and 2 i + 1.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    is_neox_style: bool


NO_ROTATION = Rotation(torch.ones(1, 0), torch.zeros(1, 0), True)
"""For queries that are not turned: it has position 0 alone, and turns no element."""


def turn_back(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool) -> torch.Tensor:
    """Turn query tokens back.

    Args:
        query: (T, H, D).
        cos, sin: (T, R / 2) float32, of the angles; elements behind the first R of a head stay.

    Returns:
        A new (T, H, D) in the query's dtype; computed in float32.
    """
    pairs = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    turned = query.float()
    if is_neox_style:
        first, second = turned[..., :pairs], turned[..., pairs : 2 * pairs]
        parts = [first * cos + second * sin, second * cos - first * sin, turned[..., 2 * pairs :]]
        return torch.cat(parts, -1).to(query.dtype)
    first, second = turned[..., : 2 * pairs : 2], turned[..., 1 : 2 * pairs : 2]
    rotated = torch.stack([first * cos + second * sin, second * cos - first * sin], -1).flatten(-2)
    return torch.cat([rotated, turned[..., 2 * pairs :]], -1).to(query.dtype)
