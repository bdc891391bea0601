"""A layer's decode step on a GPU: every request has one token, and nothing is read from the host.

The same as mix.py and attend_step.py compute, in a few launches that a CUDA graph can record.
"""

from __future__ import annotations

import torch
import triton

from starling.attention_backends.attamba.attamba_backend import AttambaMetadata
from starling.attention_backends.attamba.attend_step import Cache, Sizes
from starling.attention_backends.attamba.decode_kernels import join_kernel, mix_kernel, rows_kernel, store_kernel
from starling.attention_backends.attamba.mixer import MixerParameters, MixerSizes
from starling.attention_backends.kernels.contract import Operands
from starling.attention_backends.kernels.triton.paged import paged_attention

MAX_ROWS, MAX_VALUES = 16, 4096
"""The scan reads at most so many rows of a chunk at a time, and at most so many values of u, and of B."""


def mix_decode(
    projected: torch.Tensor,
    pages: torch.Tensor,
    step: AttambaMetadata,
    chunk_size: int,
    offset: int,
    parameters: MixerParameters,
    sizes: MixerSizes,
    eps: float,
) -> torch.Tensor:
    """``mix.mix`` of a step with one token for each of R requests.

    Args:
        projected, pages, parameters, sizes, eps: as there.
        step: of the cache of rows.
        chunk_size, offset: of the layer.
    """
    requests = step.num_tokens
    out = projected.new_empty(sizes.count, requests, sizes.inner)
    grid = (requests, sizes.count)
    strides = projected.stride(0), *pages.stride()[:2], step.block_table.stride(0)
    rows_kernel[grid](
        projected,
        pages,
        step.block_table,
        step.seq_lens,
        step.slot_mapping,
        *strides,
        INNER=sizes.inner,
        WIDTH=sizes.width,
        PAGE_TOKENS=pages.shape[1],
        BLOCK_W=triton.next_power_of_2(sizes.width),
    )
    mix_kernel[grid](
        projected,
        pages,
        step.block_table,
        step.seq_lens,
        step.slot_mapping,
        *parameters,
        out,
        chunk_size,
        offset,
        eps,
        *strides,
        HEADS=sizes.heads,
        INNER=sizes.inner,
        STATE=sizes.state,
        TAPS=sizes.taps,
        PAGE_TOKENS=pages.shape[1],
        **mix_blocks(sizes, chunk_size),
        num_warps=warps(sizes),
    )
    return out


def mix_blocks(sizes: MixerSizes, chunk_size: int) -> dict[str, int]:
    """Return the block sizes of the scan: powers of 2."""
    inner, state = triton.next_power_of_2(sizes.inner), triton.next_power_of_2(sizes.state)
    rows = min(MAX_ROWS, triton.next_power_of_2(chunk_size), max(1, MAX_VALUES // max(inner, state)))
    return {"BLOCK_R": rows, "BLOCK_I": inner, "BLOCK_S": state}


def warps(sizes: MixerSizes) -> int:
    """Warps of a program of the scan."""
    return 4 if sizes.inner <= 512 else 8


def attend_decode(
    query: torch.Tensor,
    mixed: tuple[torch.Tensor, ...],
    own: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    states: Cache,
    window: Cache,
    offset: int,
    sizes: Sizes,
    out: torch.Tensor,
) -> None:
    """``attend.attend`` of a step with one token for each of R requests, into ``out`` (R, heads x head size)."""
    seq_lens, keys, values = window.step.seq_lens, states.pages.key_rows, states.pages.value_rows
    heads, head_size = keys.shape[-2:]
    rotated, num_states = store_decode(query, mixed, own, angles, states, window, offset, sizes)
    starts, scale = window.step.query_start_loc, sizes.scale
    of_states = Operands(rotated, keys, values, states.step.block_table, starts, num_states, scale=scale)
    recent = Operands(
        rotated,
        window.pages.key_rows,
        window.pages.value_rows,
        window.step.block_table,
        starts,
        seq_lens,
        scale=scale,
        window=sizes.window,
    )
    join_kernel[len(seq_lens), heads](
        rotated,
        *paged_attention(of_states),
        *paged_attention(recent),
        seq_lens,
        window.step.slot_mapping,
        keys,
        values,
        states.step.block_table,
        out,
        sizes.chunk,
        offset,
        sizes.window - 1,
        scale,
        *keys.stride()[:3],
        states.step.block_table.stride(0),
        out.stride(0),
        HEAD_SIZE=head_size,
        BLOCK_D=triton.next_power_of_2(head_size),
    )


def store_decode(
    query: torch.Tensor,
    mixed: tuple[torch.Tensor, ...],
    own: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    states: Cache,
    window: Cache,
    offset: int,
    sizes: Sizes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store the keys and values of the step's tokens; the arguments are those of ``attend_decode``.

    Returns:
        (R, heads, head size), the rotated queries, and (R,) int32, how many chunk states each request's query sees.
    """
    seq_lens, keys = window.step.seq_lens, states.pages.key_rows
    rotated, num_states = query.new_empty(len(seq_lens), *keys.shape[-2:]), torch.empty_like(seq_lens)
    store_kernel[len(seq_lens), keys.shape[-2]](
        query,
        *mixed,
        own,
        seq_lens,
        window.step.slot_mapping,
        *angles,
        rotated,
        num_states,
        keys,
        states.pages.value_rows,
        states.step.block_table,
        window.pages.key_rows,
        window.pages.value_rows,
        window.step.block_table,
        sizes.chunk,
        offset,
        sizes.window - 1,
        query.stride(0),
        mixed[0].stride(0),
        own.stride(0),
        keys.stride(0),
        window.pages.key_rows.stride(0),
        *keys.stride()[1:3],
        states.step.block_table.stride(0),
        window.step.block_table.stride(0),
        HEAD_SIZE=keys.shape[-1],
        BLOCK_D=max(1, triton.next_power_of_2(keys.shape[-1]) // 2),
    )
    return rotated, num_states
