"""Paged attention in Triton: a kernel for decode and one for prefill.

For decode each row's keys are split over programs, and the parts are merged by log-sum-exp: a decode batch has too few
query tiles to fill a GPU, and with the keys split there are enough programs (Flash-Decoding). vLLM's
``decode_attention_fwd`` is not used: it has no window, returns NaN for a row without keys and takes one query per row.
Its kernel for one query head per KV head multiplies Q and K in the query's dtype, so its log-sum-exp is accurate to
bfloat16 only.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from starling.attention_backends.kernels.contract import Operands
from starling.attention_backends.kernels.triton.launch import launch

DECODE_LANES = 16
PREFILL_LANES = 128
MAX_QUERIES_PER_DECODE_ROW = 8
PROGRAMS_PER_MULTIPROCESSOR = 2
MIN_KEYS_PER_SPLIT = 256
MAX_SPLITS = 128


def num_splits(rows: int, heads: int, seq_len: int, multiprocessors: int) -> int:
    """Return the number of parts to split each row's keys into: enough programs to fill the card, no part too short.

    Args:
        rows: rows of the batch.
        heads: KV heads. A batch that is not split has rows x heads programs.
        seq_len: an upper bound of the keys of a row.
        multiprocessors: multiprocessors of the card.
    """
    wanted = -(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // max(1, rows * heads))
    worth = -(-seq_len // MIN_KEYS_PER_SPLIT)
    return max(1, min(wanted, worth, MAX_SPLITS))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, where programs run one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def rows_that_fill(multiprocessors: int, heads: int, programs: int = PROGRAMS_PER_MULTIPROCESSOR) -> int:
    """Return the number of rows whose programs, one per KV head, fill a card with ``multiprocessors`` multiprocessors.

    Args:
        programs: programs per multiprocessor.
    """
    return -(-programs * multiprocessors // heads)


@triton.jit(do_not_specialize=("splits",))
def merge_kernel(
    parts,
    parts_lse,
    out,
    lse,
    splits,
    parts_token_stride,
    parts_head_stride,
    lse_token_stride,
    lse_head_stride,
    out_token_stride,
    out_head_stride,
    out_stride,
    out_lse_token_stride,
    HEAD_SIZE_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid (tokens, heads). Merges the splits of one head's output, weighted by their parts of the softmax's sum.

    The splits of ``parts`` and of ``parts_lse`` are as many tokens apart as there are.
    """
    token, tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    head = tl.program_id(1)
    lane_s = tl.arange(0, BLOCK_S)
    lane_v = tl.arange(0, BLOCK_DV)
    parts_lse += token * lse_token_stride + head * lse_head_stride
    parts += token * parts_token_stride + head * parts_head_stride
    part_lse = tl.load(parts_lse + lane_s * (tokens * lse_token_stride), mask=lane_s < splits, other=float("-inf"))
    peak = tl.max(part_lse, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(part_lse - base), 0)
    acc = tl.zeros([BLOCK_DV], dtype=tl.float32)
    for _ in range(splits):
        weight = tl.exp(tl.load(parts_lse) - base)
        # A part without keys was never written, so it must not be read.
        size = tl.where(weight > 0, HEAD_SIZE_V, 0)
        acc += weight * tl.load(parts + lane_v, mask=lane_v < size, other=0.0)
        parts_lse += tokens * lse_token_stride
        parts += tokens * parts_token_stride
    has_key = total > 0
    acc = acc / tl.where(has_key, total, 1.0)
    out += token * out_token_stride + head * out_head_stride
    tl.store(out + lane_v * out_stride, acc.to(out.dtype.element_ty), mask=lane_v < HEAD_SIZE_V)
    tl.store(lse + token * out_lse_token_stride + head, tl.where(has_key, base + tl.log(total), float("-inf")))


def decode_attention(operands: Operands, splits: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract of contract.py: correct for rows of any length, fast for rows of few queries.

    Args:
        splits: parts of each row's keys; by default ``num_splits`` of the longest row that the block table can hold.
            A window limits that length, as keys that no query sees need no part.

    Raises:
        ValueError: ``launch`` refuses the operands.
    """
    sizes, window = operands.sizes, operands.window
    tokens, heads, size = sizes.tokens, sizes.heads, sizes.value_size
    out, lse = operands.make_out(), operands.make_lse()
    if splits is None:
        longest = operands.block_table.shape[1] * sizes.page_size
        longest = longest if window is None else min(longest, window)
        splits = num_splits(sizes.rows, sizes.kv_heads, longest, multiprocessors(operands.query.device))
    if splits == 1:
        launch(operands, out[None], lse[None], DECODE_LANES)
        return out, lse
    parts = out.new_empty(splits, tokens, heads, size, dtype=torch.float32)
    parts_lse = lse.new_empty(splits, tokens, heads)
    launch(operands, parts, parts_lse, DECODE_LANES)
    if tokens:
        merge_kernel[(tokens, heads)](
            parts,
            parts_lse,
            out,
            lse,
            splits,
            *parts.stride()[1:3],
            *parts_lse.stride()[1:],
            *out.stride(),
            lse.stride(0),
            HEAD_SIZE_V=size,
            BLOCK_DV=triton.next_power_of_2(size),
            BLOCK_S=triton.next_power_of_2(max(splits, MAX_SPLITS)),
        )
    return out, lse


def prefill_attention(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract of contract.py with one program per query tile and KV head, over all keys of its queries.

    Raises:
        ValueError: ``launch`` refuses the operands.
    """
    out, lse = operands.make_out(), operands.make_lse()
    launch(operands, out[None], lse[None], PREFILL_LANES)
    return out, lse


def is_decode(tokens: int, rows: int) -> bool:
    """Return whether a batch has few enough queries per row, on average, to split the rows by keys.

    The limit leaves room for the draft tokens of speculative decoding. Both kernels are correct for every batch. Only
    the average is known without reading a tensor back from the device.
    """
    return tokens <= MAX_QUERIES_PER_DECODE_ROW * rows


def paged_attention(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the contract of contract.py without reading a tensor on the host, so that a CUDA graph can capture it.

    Raises:
        ValueError: the kernels, or the card, do not support the operands (see launch.py).
    """
    attend = decode_attention if is_decode(operands.sizes.tokens, operands.sizes.rows) else prefill_attention
    return attend(operands)
