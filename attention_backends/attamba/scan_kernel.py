"""The mixers' scan in Triton, for GPUs; scan.py is the same in torch, and what this is tested against.

A program takes one head of one mixer over some tokens of a chunk: convolution, decays and both products stay in
registers, and only what the step asks for is computed. B and C, which all heads share, are made anew by each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_backends.attamba.scan import Sizes

BLOCK_Q, BLOCK_S = 16, 16  # tokens asked for, and values of the state, that a program takes at a time


@triton.jit
def _mixed(rows, weight, column, columns, row, width, row_stride, TAPS: tl.constexpr):
    """SiLU of the causal convolution of (row, column) in float32; 0 past the chunk's width and the columns."""
    here = columns[None, :] & (row < width)[:, None]
    total = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for back in tl.static_range(TAPS):
        seen = here & (row >= back)[:, None]
        taken = tl.load(rows + (row - back)[:, None] * row_stride + column[None, :], mask=seen, other=0.0)
        tap = tl.load(weight + column * TAPS + (TAPS - 1 - back), mask=columns, other=0.0)
        total += taken.to(tl.float32) * tap.to(tl.float32)[None, :]
    return total / (1 + tl.exp(-total))


@triton.jit
def scan_kernel(
    projected,
    conv_weight,
    a_log,
    skip,
    starts,
    place,
    out,
    width,
    chunk_stride,
    row_stride,
    mixer_stride,
    HEADS: tl.constexpr,
    INNER: tl.constexpr,
    STATE: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (chunks, mixers x heads, blocks of a chunk's tokens).

    Of chunk n the tokens of the step from ``starts[n]`` to ``starts[n + 1]`` are asked for, which are consecutive.
    """
    SIZE: tl.constexpr = INNER // HEADS
    chunk, at_head, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    mixer, head = at_head // HEADS, at_head % HEADS
    first, last = tl.load(starts + chunk), tl.load(starts + chunk + 1)
    base = tl.load(place + first)
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token = first + query - base
    asked = (token >= first) & (token < last)
    if (block * BLOCK_Q + BLOCK_Q <= base) | (block * BLOCK_Q >= base + last - first):
        return

    rows = projected + chunk * chunk_stride + mixer * mixer_stride
    weight = conv_weight + mixer * (INNER + 2 * STATE) * TAPS
    row, lane = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_D)
    scores = tl.zeros([BLOCK_Q, BLOCK_W], dtype=tl.float32)
    for start in range(0, STATE, BLOCK_S):
        state = start + tl.arange(0, BLOCK_S)
        b = _mixed(rows, weight, INNER + state, state < STATE, row, width, row_stride, TAPS)
        c = _mixed(rows, weight, INNER + STATE + state, state < STATE, query, width, row_stride, TAPS)
        # Three products of tf32 keep float32's digits on tensor cores.
        scores = tl.dot(c, tl.trans(b), scores, input_precision="tf32x3")

    dt = tl.load(rows + row * row_stride + INNER + 2 * STATE + head, mask=row < width, other=0.0).to(tl.float32)
    dt = tl.where(row < width, tl.maximum(dt, 0.0) + tl.log(1 + tl.exp(-tl.abs(dt))), 0.0)  # softplus
    # In float64, as in scan.py: it falls far in a long chunk, and differences of it are exponents.
    decay = tl.cumsum((dt * -tl.exp(tl.load(a_log + at_head).to(tl.float32))).to(tl.float64), 0)
    at_query = tl.sum(tl.where(query[:, None] == row[None, :], decay[None, :], 0.0), 1)
    sees = row[None, :] <= query[:, None]
    left = tl.exp(tl.where(sees, at_query[:, None] - decay[None, :], 0.0).to(tl.float32))
    weights = tl.where(sees, left * scores * dt[None, :], 0.0)

    column = head * SIZE + lane
    u = _mixed(rows, weight, column, lane < SIZE, row, width, row_stride, TAPS)
    own = _mixed(rows, weight, column, lane < SIZE, query, width, row_stride, TAPS)
    y = tl.dot(weights, u, tl.load(skip + at_head).to(tl.float32) * own, input_precision="tf32x3")
    to = out + (token * (tl.num_programs(1) // HEADS) + mixer)[:, None] * INNER + column[None, :]
    tl.store(to, y, mask=asked[:, None] & (lane < SIZE)[None, :])


def chunk_scan(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    skip: torch.Tensor,
    sizes: Sizes,
    chunk: torch.Tensor,
    place: torch.Tensor,
) -> torch.Tensor:
    """As scan.chunk_scan. Columns of ``projected`` are contiguous; the parameters are contiguous as a whole."""
    count, width, mixers, _ = projected.shape
    starts = torch.searchsorted(chunk, torch.arange(count + 1, device=chunk.device))
    out = projected.new_empty(len(place), mixers, sizes.inner, dtype=torch.float32)
    block_w, block_d = (max(16, triton.next_power_of_2(size)) for size in (width, sizes.inner // sizes.heads))
    block_q = min(BLOCK_Q, block_w)
    scan_kernel[(count, mixers * sizes.heads, triton.cdiv(width, block_q))](
        projected,
        conv_weight,
        a_log,
        skip,
        starts,
        place,
        out,
        width,
        *projected.stride()[:3],
        HEADS=sizes.heads,
        INNER=sizes.inner,
        STATE=sizes.state,
        TAPS=sizes.taps,
        BLOCK_W=block_w,
        BLOCK_Q=block_q,
        BLOCK_S=BLOCK_S,
        BLOCK_D=block_d,
        num_warps=warps(block_w),
    )
    return out


def warps(block_w: int) -> int:
    """Warps of a program, of whose registers the widest tiles are (BLOCK_Q, block_w)."""
    return 4 if block_w <= 64 else 8
