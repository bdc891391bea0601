"""The mixers of a layer for one step: from projected tokens to the inputs of the output projections.

The cache keeps [u B C | dt] of the tokens of open chunks, so no token is projected twice. A chunk is scanned from its
first token for each step. That is exact, and reads fewer values than a running state of inner x state would have, but
for the longest chunks. On CPU, a C++ op (kernels/cpu/mix.h) does all of it. Elsewhere it is torch, and Triton
for the scan.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from starling.attention_backends.attamba.cache import locate
from starling.attention_backends.attamba.chunks import ChunkPlan
from starling.attention_backends.attamba.mixer import MixerParameters, MixerSizes
from starling.attention_backends.attamba.scan import chunk_scan
from starling.attention_backends.kernels.cpu.paged_op import DTYPES, built_op

MAX_TAPS = 4
"""The longest convolution of the C++ op."""

GROUP_ROWS = 16384
"""Rows of chunks that torch processes at once. The limit bounds the memory of a step: a step with a token in each of
many chunks has many more rows than tokens. With fewer rows, a GPU would run many small kernels."""


def mix(
    projected: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    plan: ChunkPlan,
    parameters: MixerParameters,
    sizes: MixerSizes,
    eps: float,
) -> torch.Tensor:
    """Return the outputs of all mixers before their output projections, and store the rows of the step's tokens.

    Args:
        projected: (T, mixers x [gate | u B C | dt]) of the tokens of the step.
        pages: (num_pages, rows, mixers x [u B C | dt]), the cache of the rows of open chunks.
        block_table: (R, columns) int32, of that cache.
        plan: plan of the layer.
        parameters, sizes: parameters and sizes of the mixers.
        eps: epsilon of the norm after the gate.

    Returns:
        (mixers, T, inner) in the dtype of ``projected``.
    """
    on_cpu = projected.device.type == "cpu" and projected.dtype in DTYPES
    ops = built_op() if on_cpu and sizes.taps <= MAX_TAPS else None
    if ops is None:
        return mix_in_torch(projected, pages, block_table, plan, parameters, sizes, eps)
    return ops.attamba_mix(projected, pages, block_table, *plan.of_mixers, *parameters, sizes.state, eps)


def mix_in_torch(
    projected: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    plan: ChunkPlan,
    parameters: MixerParameters,
    sizes: MixerSizes,
    eps: float,
) -> torch.Tensor:
    """``mix`` on any device."""
    gate, rows = projected.unflatten(-1, (sizes.count, -1)).split([sizes.inner, sizes.width], -1)
    on_device = plan.to(projected.device).plan
    chunk_index, index_in_chunk = places(on_device)

    def locate_in_chunk(chunk: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        request, position = on_device.chunk_request[chunk], on_device.chunk_start[chunk] + index
        return locate(block_table, request, position, pages.shape[1])

    pages[locate_in_chunk(chunk_index, index_in_chunk)] = rows.flatten(1)
    out = projected.new_empty(sizes.count, len(projected), sizes.inner)
    for chunks, tokens in groups(plan, GROUP_ROWS):
        of_group = torch.arange(chunks.start, chunks.stop, device=projected.device)[:, None]
        width = int(plan.chunk_rows[chunks].max())
        # A chunk that is shorter than the longest of its group repeats its last row.
        index = torch.arange(width, device=projected.device).minimum(on_device.chunk_rows[chunks, None] - 1)
        y = chunk_scan(
            pages[locate_in_chunk(of_group, index)].unflatten(-1, (sizes.count, -1)),
            parameters,
            sizes,
            chunk_index[tokens] - chunks.start,
            index_in_chunk[tokens],
        )
        y = functional.rms_norm(y * functional.silu(gate[tokens].float()), y.shape[-1:], eps=eps) * parameters.norm
        out[:, tokens] = y.to(out.dtype).transpose(0, 1)
    return out


def places(plan: ChunkPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the chunk (0 to N - 1) of each token of the step and its index within the chunk: two (T,) int64."""
    counts = plan.chunk_tokens.diff()
    chunk = torch.repeat_interleave(counts, output_size=len(plan.token_0_seen))
    first = plan.chunk_tokens[:-1] - (plan.chunk_rows - counts)  # where the chunk's row 0 would be
    return chunk, torch.arange(len(chunk), device=chunk.device) - first[chunk]


def groups(plan: ChunkPlan, max_rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield groups of one chunk or at most ``max_rows`` rows (chunks x longest), with the tokens of each group."""
    count = len(plan.chunk_rows)
    step = max(1, max_rows // int(plan.chunk_rows.max()))
    bounds = plan.chunk_tokens.tolist()
    for first in range(0, count, step):
        end = min(first + step, count)
        yield slice(first, end), slice(bounds[first], bounds[end])
