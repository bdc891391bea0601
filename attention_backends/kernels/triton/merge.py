"""The merge of parts into their tokens in Triton: in a fixed order, so that equal calls have equal results.

torch's ``index_add_`` adds on a GPU in the order in which threads come.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=("tokens", "order", "num_parts"))
def merge_tokens_kernel(
    out,
    lse,
    parts,
    part_lses,
    tokens,
    order,
    num_parts,
    out_token_stride,
    out_head_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (parts, heads). The program of a token's first part merges all of the token's parts, in their order, and
    ``out`` and ``lse``.
    """
    place = tl.program_id(0)
    head, heads = tl.program_id(1), tl.num_programs(1)
    part = tl.load(order + place)
    token = tl.load(tokens + part)
    before = tl.load(order + place - 1, mask=place > 0, other=0)
    if (place > 0) & (tl.load(tokens + before) == token):
        return
    lane = tl.arange(0, BLOCK)
    mask = lane < SIZE
    out += token * out_token_stride + head * out_head_stride + lane
    peak = tl.load(lse + token * heads + head)
    acc = tl.load(out, mask=mask, other=0.0)
    total = tl.where(peak == float("-inf"), 0.0, 1.0)
    is_same = place < num_parts
    while is_same:
        row = part * heads + head
        part_lse = tl.load(part_lses + row)
        new_peak = tl.maximum(peak, part_lse)
        # For a token that has met no key yet, any finite base avoids -inf - (-inf).
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay, weight = tl.exp(peak - base), tl.exp(part_lse - base)
        total = total * decay + weight
        acc = acc * decay + weight * tl.load(parts + row * SIZE + lane, mask=mask, other=0.0).to(tl.float32)
        peak = new_peak
        place += 1
        is_same = place < num_parts
        part = tl.load(order + place, mask=is_same, other=0)
        is_same = is_same & (tl.load(tokens + part) == token)
    has_key = total > 0
    acc = acc / tl.where(has_key, total, 1.0)
    tl.store(out, acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + token * heads + head, tl.where(has_key, peak + tl.log(total), float("-inf")))


def merge_tokens(
    out: torch.Tensor,
    lse: torch.Tensor,
    tokens: torch.Tensor,
    order: torch.Tensor,
    parts: torch.Tensor,
    part_lses: torch.Tensor,
) -> None:
    """Merge parts with the attention that their tokens have.

    Args:
        out: (T, H, D) float32, the last dimension contiguous. Tokens without a part stay as they are.
        lse: (T, H) float32, contiguous, of the attention that ``out`` has.
        tokens: (P,) int64, the token that each part is of.
        order: (P,) int64, numbers of the parts: those of a token are next to one another.
        parts, part_lses: (P, H, D) and (P, H) float32, contiguous.
    """
    num_parts, heads, size = parts.shape
    if not num_parts:
        return
    merge_tokens_kernel[(num_parts, heads)](
        out,
        lse,
        parts,
        part_lses,
        tokens,
        order,
        num_parts,
        *out.stride()[:2],
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
    )
