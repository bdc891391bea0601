"""Functions that run in the worker process of the xformers tests.

Without a GPU, xformers' paged kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import os

import torch

from starling.attention_backends.kernels import reference
from tests.kernels.cases import Case
from tests.kernels.triton.jobs import DEVICE, Errors, compare, make_operands, start_worker


def start_xformers_worker() -> None:
    start_worker()
    os.environ["XFORMERS_ENABLE_TRITON"] = "1"


def measure_xformers(case: Case, strides: str) -> Errors:
    """Compare xformers' implementation to the reference.

    On a CPU, the operator is marked as supporting it, and the reference computes the causal part: FlashAttention needs
    a GPU.
    """
    from starling.attention_backends.kernels import xformers_paged as xformers_backend

    if DEVICE == "cpu":
        xformers_backend.paged_op(case.page_size).SUPPORTED_DEVICES = {"cpu"}
        xformers_backend.causal_part = reference_causal_part
    return compare(case, make_operands(case, strides), xformers_backend.paged_attention)


def reference_causal_part(query, key, value, lens, scale):
    """`xformers_backend.causal_part` computed by the reference, row by row."""
    outs, lses, start = [], [], 0
    for count in lens:
        own = slice(start, start + count)
        mask = reference.visible_mask(count, count, causal=True, window=None)
        row = [operand[0, own].double() for operand in (query, key[:, :, :, 0], value[:, :, :, 0])]
        out, lse = reference.masked_attention(row[0].flatten(1, 2), *row[1:], mask, scale)
        outs.append(out)
        lses.append(lse)
        start += count
    out, lse = torch.cat(outs), torch.cat(lses)
    return out.view(query.shape).to(query.dtype), lse.T.reshape(1, *query.shape[2:4], -1)
