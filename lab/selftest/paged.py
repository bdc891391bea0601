"""Random calls of the contract of paged attention, and the error of an implementation against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from starling.attention_backends.kernels import reference
from starling.attention_backends.kernels.contract import DIMENSIONS, Layout, Operands

PAGE_SIZE, KV_HEADS, GROUP, SIZE = 32, 2, 2, 64
Rows = tuple[tuple[int, ...], tuple[int, ...]]
"""The query tokens and the keys of each row."""
# Extend, decode, no keys, a whole prompt, no queries, and more queries than keys, so that the first see no key.
MIXED: Rows = ((5, 1, 2, 133, 0, 4), (370, 900, 0, 133, 9, 3))
DECODE: Rows = ((1, 1, 1, 3), (1, 900, 0, 531))

Attention = Callable[[Operands], tuple[torch.Tensor, torch.Tensor]]


def make_operands(rows: Rows, dtype: torch.dtype) -> Operands:
    """Rows in scattered pages of layout PAGES, on the CPU, with a fixed seed. Memory without a key holds NaN."""
    query_lens, seq_lens = rows
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // PAGE_SIZE) for length in seq_lens]
    page_ids = torch.randperm(sum(counts) + 1, generator=generator)
    shape = (len(page_ids), PAGE_SIZE, KV_HEADS, SIZE)
    keys, values = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    table = torch.full((len(counts), max(counts) + 1), int(page_ids[-1]), dtype=torch.int32)
    for row, (count, length) in enumerate(zip(counts, seq_lens, strict=True)):
        own = page_ids[sum(counts[:row]) : sum(counts[: row + 1])]
        table[row, :count] = own
        position = torch.arange(length)
        for cache in (keys, values):
            drawn = torch.randn(length, KV_HEADS, SIZE, generator=generator)
            cache[own[position // PAGE_SIZE], position % PAGE_SIZE] = drawn.to(dtype)
    query = torch.randn(sum(query_lens), KV_HEADS * GROUP, SIZE, generator=generator).to(dtype)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return Operands(query, keys, values, table, starts, lens, scale=SIZE**-0.5, layout=Layout.PAGES)


@dataclass(frozen=True)
class Errors:
    """The error of an implementation.

    Attributes:
        ratio: RMS error of the output over that of torch's SDPA in the same dtype, plus one ulp of float32.
        lse: largest absolute error of the log-sum-exp; infinite where a query without keys has a finite one.
    """

    ratio: float
    lse: float


def measure(attention: Attention, operands: Operands, device: str) -> Errors:
    """Run ``attention`` on a device, with an output that is NaN before, and compare it with the reference."""
    wide = {name: getattr(operands, name).double() for name in ("query", "key_cache", "value_cache")}
    exact, exact_lse = reference.paged_attention(replace(operands, **wide))
    on_device = {name: getattr(operands, name).to(device) for name in DIMENSIONS}
    given = torch.full(operands.query.shape, float("nan"), dtype=operands.query.dtype, device=device)
    out, lse = attention(replace(operands, **on_device, out=given))
    out, lse = out.double().cpu(), lse.double().cpu()
    visible = exact_lse.isfinite()
    same = torch.equal(lse.isneginf(), ~visible) and not out[~visible].any()
    lse_error = (lse - exact_lse)[visible].abs().max().item() if same else float("inf")
    allowed = rms(sdpa(operands).double() - exact) + torch.finfo(torch.float32).eps * rms(exact)
    return Errors(rms(out - exact) / allowed, lse_error)


def sdpa(operands: Operands) -> torch.Tensor:
    """torch's SDPA on the CPU for the same numbers, in the query's dtype, row by row."""
    out = torch.zeros_like(operands.query)
    for row in range(operands.sizes.rows):
        first, last = operands.query_start_loc[row : row + 2].tolist()
        length = int(operands.seq_lens[row])
        page_ids = operands.block_table[row, : -(-length // PAGE_SIZE)].long()
        mask = reference.visible_mask(last - first, length, causal=True, window=None)
        seeing = slice(last - int(mask.any(1).sum()), last)
        if not mask.any():
            continue
        key, value = (
            cache[page_ids].flatten(0, 1)[:length].transpose(0, 1)[None] for cache in (operands.keys, operands.values)
        )
        query = operands.query[seeing].transpose(0, 1)[None]
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[mask.any(1)], scale=operands.scale, enable_gqa=True
        )
        out[seeing] = attended[0].transpose(0, 1)
    return out


def rms(difference: torch.Tensor) -> float:
    return difference.double().square().mean().sqrt().item()
