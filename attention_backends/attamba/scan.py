"""The Mamba-2 mixers over chunks that stand beside one another: a masked product for each, no loop over tokens.

arXiv 2405.21060, section 6 (the quadratic form of state space duality), which is exact, and cheap as chunks are short.
M mixers of one input, SSM_k and SSM_v, run as one. Plain torch; scan_kernel.py is the same in Triton.
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


CACHED_ROWS = 256
"""Rows of chunks that are taken at once: what is made of them on the way stays in a processor's second-level cache."""


def causal_conv(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Depthwise convolution over each chunk alone, zeros before it.

    Args:
        rows: (N, W, M, C); weight: (M, C, taps), the last tap on the token itself.
    """
    taps = weight.movedim(-1, 0).flip(0).contiguous()  # channels beside one another, as in the rows
    mixed = rows * taps[0]
    for back in range(1, min(len(taps), rows.shape[1])):
        mixed[:, back:].addcmul_(rows[:, :-back], taps[back])
    return mixed


def chunk_scan(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    skip: torch.Tensor,
    sizes: Sizes,
    chunk: torch.Tensor,
    place: torch.Tensor,
) -> torch.Tensor:
    """Outputs of M mixers before their gates, in float32.

    y_t = C_t S_t + D u_t, S_t = exp(dt_t A) S_{t-1} + dt_t u_t B_t^T.

    Args:
        projected: (N, W, M, inner + 2 state + heads), [u B C | dt] of each chunk's tokens from its first on. What
            stands past a chunk's last token changes nothing before it.
        conv_weight: (M, inner + 2 state, taps).
        a_log, skip: (M, heads), A = -exp(a_log) and D.
        chunk, place: (T,) int64, falling nowhere: which token of which chunk is asked for, at least one of each.

    Returns:
        (T, M, inner).
    """
    count, width = projected.shape[:2]
    group = max(1, CACHED_ROWS // width)
    if count <= group:
        return _scan(projected, conv_weight, a_log, skip, sizes, chunk, place)
    first = torch.arange(0, count + group, group, device=chunk.device)
    tokens = torch.searchsorted(chunk, first).tolist()
    parts = [
        _scan(projected[at : at + group], conv_weight, a_log, skip, sizes, chunk[start:end] - at, place[start:end])
        for at, start, end in zip(range(0, count, group), tokens, tokens[1:], strict=False)
    ]
    return torch.cat(parts)


def _scan(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    skip: torch.Tensor,
    sizes: Sizes,
    chunk: torch.Tensor,
    place: torch.Tensor,
) -> torch.Tensor:
    """chunk_scan of few chunks."""
    count, width = projected.shape[:2]
    mixed, dt = projected.float().split([sizes.inner + 2 * sizes.state, sizes.heads], -1)
    mixed = functional.silu(causal_conv(mixed, conv_weight.float()), inplace=True)
    u, b, c = mixed.split([sizes.inner, sizes.state, sizes.state], -1)
    u = u.unflatten(-1, (sizes.heads, -1))
    dt = functional.softplus(dt)
    # (N, W, M, heads), falling; in float64, for it falls far in a long chunk, and differences of it are exponents.
    decay = (dt * -a_log.float().exp()).double().cumsum(1)
    asked = torch.arange(width, device=projected.device).expand(count, -1)
    c_asked, u_asked, decay_asked = c, u, decay
    if len(place) == count:  # one token a chunk, as in decode
        asked = place[:, None]
        c_asked, u_asked, decay_asked = (each[chunk, place][:, None] for each in (c, u, decay))
        place = torch.zeros_like(place)
    later = torch.arange(width, device=projected.device) > asked[:, None, None, :, None]
    # From here on mixers and heads stand before tokens. (N, M, heads, Q, W): what is left at a token of one before it.
    decay, decay_asked, dt = (each.permute(0, 2, 3, 1) for each in (decay, decay_asked, dt))
    left = (decay_asked[..., None] - decay[..., None, :]).float().masked_fill_(later, float("-inf")).exp_()  # at most 1
    scores = c_asked.transpose(1, 2) @ b.permute(0, 2, 3, 1)  # (N, M, Q, W)
    weights = left.mul_(scores[:, :, None]).mul_(dt[..., None, :])
    y = (weights @ u.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)  # (N, Q, M, heads, head)
    return y.addcmul(skip.float()[..., None], u_asked)[chunk, place].flatten(-2)
