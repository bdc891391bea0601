"""The scan of the Mamba-2 mixers over chunks side by side: one masked product per chunk, no loop over tokens.

The masked product is exact (arXiv 2405.21060, section 6: the quadratic form of state space duality), and cheap because
chunks are short. The M mixers of one input, SSM_k and SSM_v, run together. ``chunk_scan`` here is plain torch, for CPUs
without the op of kernels/cpu/mix.h; for other devices it calls the Triton version in scan_kernel.py.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from starling.attention_backends.attamba.mixer import MixerParameters, MixerSizes

CACHED_ROWS = 256
"""Rows of chunks to scan at once: the intermediate results then fit a processor's second-level cache."""


def causal_conv(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Depthwise causal convolution within each chunk, with zeros before the chunk.

    Args:
        rows: (N, W, M, C), N chunks of W tokens.
        weight: (M, taps, C); the last tap weighs the token itself.

    Returns:
        (N, W, M, C).
    """
    taps = weight.movedim(1, 0).flip(0)
    mixed = rows * taps[0]
    for back in range(1, min(len(taps), rows.shape[1])):
        mixed[:, back:].addcmul_(rows[:, :-back], taps[back])
    return mixed


def chunk_scan(
    projected: torch.Tensor,
    parameters: MixerParameters,
    sizes: MixerSizes,
    chunk_index: torch.Tensor,
    index_in_chunk: torch.Tensor,
) -> torch.Tensor:
    """Return the outputs of M mixers before their gates, in float32, for the T tokens of a step.

    y_t = C_t S_t + D u_t, S_t = exp(dt_t A) S_{t-1} + dt_t u_t B_t^T.

    Args:
        projected: (N, W, M, inner + 2 state + heads), [u B C | dt] of each chunk's tokens from its first token on.
            Values after a chunk's last token do not affect the result.
        parameters, sizes: parameters and sizes of the mixers.
        chunk_index: (T,) int64, chunk of each token; non-decreasing, with at least one token for each chunk.
        index_in_chunk: (T,) int64, index of each token in its chunk; consecutive within a chunk.

    Returns:
        (T, M, inner).
    """
    if projected.device.type != "cpu":
        from starling.attention_backends.attamba import scan_kernel  # imports Triton, which a CPU does not need

        return scan_kernel.chunk_scan(projected, parameters, sizes, chunk_index, index_in_chunk)
    count, width = projected.shape[:2]
    group = max(1, CACHED_ROWS // width)
    if count <= group:
        return _scan_group(projected, parameters, sizes, chunk_index, index_in_chunk)
    bounds = torch.searchsorted(chunk_index, torch.arange(0, count + group, group)).tolist()
    parts = []
    for first, start, end in zip(range(0, count, group), bounds, bounds[1:], strict=False):
        chunks = projected[first : first + group]
        parts.append(_scan_group(chunks, parameters, sizes, chunk_index[start:end] - first, index_in_chunk[start:end]))
    return torch.cat(parts)


def _scan_group(
    projected: torch.Tensor,
    parameters: MixerParameters,
    sizes: MixerSizes,
    chunk_index: torch.Tensor,
    index_in_chunk: torch.Tensor,
) -> torch.Tensor:
    """``chunk_scan`` in torch of so few chunks that they fit the cache. Q tokens of each chunk are computed."""
    conv_weight, a_log, skip, _ = parameters
    count, width = projected.shape[:2]
    mixed, dt = projected.float().split([sizes.inner + 2 * sizes.state, sizes.heads], -1)
    mixed = functional.silu(causal_conv(mixed, conv_weight), inplace=True)
    u, b, c = mixed.split([sizes.inner, sizes.state, sizes.state], -1)
    u = u.unflatten(-1, (sizes.heads, -1))
    dt = functional.softplus(dt)
    # (N, W, M, heads), descending. In float64: the sum gets large in a long chunk, and its differences are exponents.
    decay = (dt * -a_log.exp()).double().cumsum(1)
    query = torch.arange(width).expand(count, -1)
    query_c, query_u, query_decay = c, u, decay
    if len(index_in_chunk) == count:  # one token per chunk, as in decode
        query = index_in_chunk[:, None]
        query_c, query_u, query_decay = (each[chunk_index, index_in_chunk][:, None] for each in (c, u, decay))
        index_in_chunk = torch.zeros_like(index_in_chunk)
    later = torch.arange(width) > query[:, None, None, :, None]
    # From here on the dimensions of mixers and heads come before that of tokens.
    decay, query_decay, dt = (each.permute(0, 2, 3, 1) for each in (decay, query_decay, dt))
    # (N, M, heads, Q, W), at most 1: the part of an earlier token's contribution that remains at a query.
    remains = (query_decay[..., None] - decay[..., None, :]).float().masked_fill_(later, float("-inf")).exp_()
    scores = query_c.transpose(1, 2) @ b.permute(0, 2, 3, 1)  # (N, M, Q, W)
    weights = remains.mul_(scores[:, :, None]).mul_(dt[..., None, :])
    y = (weights @ u.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)  # (N, Q, M, heads, head)
    return y.addcmul(skip[..., None], query_u)[chunk_index, index_in_chunk].flatten(-2)
