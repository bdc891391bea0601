"""The scan of the mixers in Triton, for GPUs. The tests compare this kernel with the torch version in scan.py.

A program computes one head of one mixer for some tokens of a chunk. The convolution, the decays and both products stay
in registers. The loops over the columns of a head and over the taps keep the tiles small enough for that: a head of 128
as one tile, with the taps unrolled, took up to 1,368 bytes of stack in chunks of 128 (float32, sm_80).
Only tokens of the step are computed. Each head computes B and C, which all heads have in common, again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from starling.attention_backends.attamba.mixer import MixerParameters, MixerSizes

BLOCK_Q, BLOCK_S, BLOCK_D = 16, 16, 32
"""Queries of a program, and the values of the state and the columns of the head that it reads at a time."""


@triton.jit
def _convolve(rows, weight, columns, column, column_mask, row, width, row_stride, TAPS: tl.constexpr):
    """SiLU of the causal convolution at (row, column), in float32; 0 past the chunk's width and outside of the mask.

    ``weight`` is (TAPS, columns).
    """
    mask = column_mask[None, :] & (row < width)[:, None]
    total = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for back in range(TAPS):
        in_chunk = mask & (row >= back)[:, None]
        values = tl.load(rows + (row - back)[:, None] * row_stride + column[None, :], mask=in_chunk, other=0.0)
        tap = tl.load(weight + (TAPS - 1 - back) * columns + column, mask=column_mask, other=0.0)
        total += values.to(tl.float32) * tap.to(tl.float32)[None, :]
    return total / (1 + tl.exp(-total))


@triton.jit(do_not_specialize=("starts", "index_in_chunk", "width"))
def scan_kernel(
    projected, conv_weight, a_log, skip, starts, index_in_chunk, out, width,
    chunk_stride, row_stride, mixer_stride,
    HEADS: tl.constexpr, INNER: tl.constexpr, STATE: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, mixers x heads, blocks of a chunk's tokens).

    The tokens ``starts[n]`` to ``starts[n + 1]`` of the step belong to chunk n. They are consecutive in the chunk.
    """
    HEAD_SIZE: tl.constexpr = INNER // HEADS
    COLUMNS: tl.constexpr = INNER + 2 * STATE
    chunk, mixer_head, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    mixer, head = mixer_head // HEADS, mixer_head % HEADS
    first, end = tl.load(starts + chunk), tl.load(starts + chunk + 1)
    first_index = tl.load(index_in_chunk + first)
    query = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token = first + query - first_index
    in_step = (token >= first) & (token < end)
    if (block * BLOCK_Q + BLOCK_Q <= first_index) | (block * BLOCK_Q >= first_index + end - first):
        return

    rows = projected + chunk * chunk_stride + mixer * mixer_stride
    weight = conv_weight + mixer * COLUMNS * TAPS
    row = tl.arange(0, BLOCK_W)
    scores = tl.zeros([BLOCK_Q, BLOCK_W], dtype=tl.float32)
    for start in range(0, STATE, BLOCK_S):
        state = start + tl.arange(0, BLOCK_S)
        b = _convolve(rows, weight, COLUMNS, INNER + state, state < STATE, row, width, row_stride, TAPS)
        c = _convolve(rows, weight, COLUMNS, INNER + STATE + state, state < STATE, query, width, row_stride, TAPS)
        # Three tf32 products on tensor cores keep the precision of float32.
        scores = tl.dot(c, tl.trans(b), scores, input_precision="tf32x3")

    dt = tl.load(rows + row * row_stride + INNER + 2 * STATE + head, mask=row < width, other=0.0).to(tl.float32)
    dt = tl.where(row < width, tl.maximum(dt, 0.0) + tl.log(1 + tl.exp(-tl.abs(dt))), 0.0)  # softplus
    # In float64, as in scan.py: the sum gets large in a long chunk, and its differences are exponents.
    decay = tl.cumsum((dt * -tl.exp(tl.load(a_log + mixer_head).to(tl.float32))).to(tl.float64), 0)
    query_decay = tl.sum(tl.where(query[:, None] == row[None, :], decay[None, :], 0.0), 1)
    causal = row[None, :] <= query[:, None]
    remains = tl.exp(tl.where(causal, query_decay[:, None] - decay[None, :], 0.0).to(tl.float32))
    weights = tl.where(causal, remains * scores * dt[None, :], 0.0)

    factor = tl.load(skip + mixer_head).to(tl.float32)
    destination = out + (token * (tl.num_programs(1) // HEADS) + mixer)[:, None] * INNER
    for start in range(0, HEAD_SIZE, BLOCK_D):
        lane = start + tl.arange(0, BLOCK_D)
        column = head * HEAD_SIZE + lane
        u = _convolve(rows, weight, COLUMNS, column, lane < HEAD_SIZE, row, width, row_stride, TAPS)
        query_u = _convolve(rows, weight, COLUMNS, column, lane < HEAD_SIZE, query, width, row_stride, TAPS)
        y = tl.dot(weights, u, factor * query_u, input_precision="tf32x3")
        tl.store(destination + column[None, :], y, mask=in_step[:, None] & (lane < HEAD_SIZE)[None, :])


def chunk_scan(
    projected: torch.Tensor,
    parameters: MixerParameters,
    sizes: MixerSizes,
    chunk_index: torch.Tensor,
    index_in_chunk: torch.Tensor,
) -> torch.Tensor:
    """As ``scan.chunk_scan``. The columns of ``projected`` and the parameters are contiguous."""
    count, width, mixers, _ = projected.shape
    starts = torch.searchsorted(chunk_index, torch.arange(count + 1, device=chunk_index.device))
    out = projected.new_empty(len(index_in_chunk), mixers, sizes.inner, dtype=torch.float32)
    blocks = tile(width, sizes.inner // sizes.heads)
    scan_kernel[(count, mixers * sizes.heads, triton.cdiv(width, blocks["BLOCK_Q"]))](
        projected,
        *parameters[:3],
        starts,
        index_in_chunk,
        out,
        width,
        *projected.stride()[:3],
        HEADS=sizes.heads,
        INNER=sizes.inner,
        STATE=sizes.state,
        TAPS=sizes.taps,
        **blocks,
        num_warps=warps(blocks["BLOCK_W"]),
    )
    return out


def tile(width: int, head_size: int) -> dict[str, int]:
    """Return the block sizes for chunks of ``width`` tokens; powers of 2, at least 16 for the tensor cores."""
    block_w, block_d = (max(16, triton.next_power_of_2(size)) for size in (width, head_size))
    return {"BLOCK_W": block_w, "BLOCK_Q": BLOCK_Q, "BLOCK_S": BLOCK_S, "BLOCK_D": min(BLOCK_D, block_d)}


def warps(block_w: int) -> int:
    """Warps of a program. The widest tile in its registers is (BLOCK_Q, block_w)."""
    return 4 if block_w <= 64 else 8
