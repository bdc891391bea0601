"""What the worker of the xformers tests runs: its paged kernel under Triton's interpreter, on the CPU."""

from __future__ import annotations

import os

import torch

from attention_backends.kernels import reference
from tests.kernels.cases import Case
from tests.kernels.triton_jobs import DEVICE, Errors, compare, operands, start_worker


def start_xformers_worker() -> None:
    start_worker()
    os.environ["XFORMERS_ENABLE_TRITON"] = "1"


def measure_xformers(case: Case, strides: str) -> Errors:
    """On a CPU two things stand in: the operator is told that it runs there, and the causal part, which is
    FlashAttention and so needs a card, is the reference's.
    """
    from attention_backends.kernels import xformers_backend

    if DEVICE == "cpu":
        xformers_backend.paged_op(case.page).SUPPORTED_DEVICES = {"cpu"}
        xformers_backend.causal_part = reference_causal_part
    return compare(case, operands(case, strides), xformers_backend.paged_attention)


def reference_causal_part(query, key, value, lens, scale):
    """`xformers_backend.causal_part` by the reference, row by row."""
    outs, lses, start = [], [], 0
    for count in lens:
        mine = slice(start, start + count)
        mask = reference.visible_mask(count, count, causal=True, window=None)
        row = [operand[0, mine].double() for operand in (query, key[:, :, :, 0], value[:, :, :, 0])]
        lse, out = reference.masked_attention(row[0].flatten(1, 2), *row[1:], mask, scale)
        outs.append(out)
        lses.append(lse)
        start += count
    out, lse = torch.cat(outs), torch.cat(lses)
    return out.view(query.shape).to(query.dtype), lse.T.reshape(1, *query.shape[2:4], -1)
