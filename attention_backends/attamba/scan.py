"""The Mamba-2 mixer over chunks that stand beside one another: a masked product for each, no loop over tokens.

arXiv 2405.21060, section 6 (the quadratic form of state space duality), which is exact, and cheap as chunks are short.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Sizes:
    """Of a mixer: heads, values of each (inner = heads x head), state, taps of the convolution."""

    heads: int
    inner: int
    state: int
    taps: int


def split_projection(weight: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """in_proj's rows [z | u B C | dt] as those of the gate z, and the rest: only the rest is needed of past tokens."""
    return weight[: sizes.inner], weight[sizes.inner :]


def causal_conv(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Depthwise convolution over each chunk alone, zeros before it.

    Args:
        rows: (N, W, C); weight: (C, taps), the last tap on the token itself.
    """
    taps = weight.shape[1]
    padded = functional.pad(rows, (0, 0, taps - 1, 0))
    shifted = [padded[:, tap : tap + rows.shape[1]] * weight[:, tap] for tap in range(taps)]
    return torch.stack(shifted).sum(0)


def chunk_scan(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    skip: torch.Tensor,
    sizes: Sizes,
) -> torch.Tensor:
    """A mixer's outputs before its gate, in float32: y_t = C_t S_t + D u_t, S_t = exp(dt_t A) S_{t-1} + dt_t u_t B_t^T.

    Args:
        projected: (N, W, inner + 2 state + heads), [u B C | dt] of each chunk's tokens from its first on. What stands
            past a chunk's last token changes nothing before it.
        conv_weight: (inner + 2 state, taps).
        a_log, skip: (heads,), A = -exp(a_log) and D.

    Returns:
        (N, W, inner).
    """
    width = projected.shape[1]
    mixed, dt = projected.float().split([sizes.inner + 2 * sizes.state, sizes.heads], -1)
    mixed = functional.silu(causal_conv(mixed, conv_weight.float()))
    u, b, c = mixed.split([sizes.inner, sizes.state, sizes.state], -1)
    dt = functional.softplus(dt)
    # (N, W, heads), falling; in float64, for it falls far in a long chunk, and differences of it are exponents.
    decay = (dt * -a_log.float().exp()).double().cumsum(1)
    u = u.unflatten(-1, (sizes.heads, -1))
    later = torch.ones(width, width, dtype=torch.bool, device=projected.device).triu(1)
    # (N, W, W, heads): what is left at a token of one before it; at most 1.
    left = (decay[:, :, None] - decay[:, None]).float().masked_fill(later[..., None], float("-inf")).exp()
    weights = left * torch.einsum("nqs,nks->nqk", c, b)[..., None] * dt[:, None]
    y = torch.einsum("nqkh,nkhd->nqhd", weights, u) + skip.float()[:, None] * u
    return y.flatten(-2)
