"""Functions that run in the worker process of the Triton tests: a case, by a kernel and by the reference.

Only the errors are returned to the test.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from starling.attention_backends.kernels import reference
from starling.attention_backends.kernels.contract import DIMENSIONS, Operands, visible_keys
from tests.kernels.cases import NAN, Case, rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def start_worker() -> None:
    """Prepare the process before Triton is imported.

    Without a GPU, Triton's kernels run as Python. Memory that has not been written holds NaN.
    """
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Errors:
    """How far a kernel is from the reference.

    Attributes:
        rms: RMS of the output's error.
        sdpa_rms: RMS of the error of torch's SDPA on the same numbers in the query's dtype.
        ulp: one ulp at the output's RMS.
        lse: largest absolute error of the log-sum-exp, over queries that see a key.
        empty: whether the queries that see no key, and only they, have out 0 and lse -inf.
    """

    rms: float
    sdpa_rms: float
    ulp: float
    lse: float
    empty: bool


def rule(case: Case) -> dict[str, Any]:
    """The arguments of ``visible_keys`` and ``visible_mask``."""
    return {"causal": case.causal, "queries_per_key": case.queries_per_key, "window": case.window}


def make_operands(case: Case, strides: str) -> Operands:
    """The operands of a case, in which keys before a row's window are freed.

    Freed slots hold NaN, and the block table has another page in the place of a freed page.
    """
    operands = case.operands()
    keys, values, table = operands.keys, operands.values, operands.block_table
    null_page = next(page_id for page_id in range(len(keys)) if page_id not in table)
    for row, (queries, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        first = visible_keys(0, queries, length, **rule(case))[0]
        for position in range(first):
            page_id, slot = table[row, position // case.page_size], position % case.page_size
            keys[page_id, slot] = values[page_id, slot] = NAN
        table[row, : first // case.page_size] = null_page
    caches = {name: restride(getattr(operands, name), strides) for name in ("key_cache", "value_cache")}
    return replace(operands, **caches)


def restride(cache: torch.Tensor, strides: str) -> torch.Tensor:
    """The same pages in another memory order: "heads first", or in every second page of a larger cache ("gaps")."""
    if strides == "heads first":
        return cache.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "gaps":
        return cache[:, None].expand(-1, 2, -1, -1, -1).contiguous()[:, 1]
    return cache


def sdpa(case: Case, operands: Operands) -> torch.Tensor:
    """torch's SDPA on the same numbers, in the query's dtype, row by row, without the softcap."""
    query, starts, keys, values = operands.query, operands.query_start_loc, operands.keys, operands.values
    out = query.new_zeros(len(query), query.shape[1], case.value_size)
    for row, (queries, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        mask = reference.visible_mask(queries, length, **rule(case))
        position = torch.arange(length)[mask.any(0)]
        page_ids, slots = operands.block_table[row, position // case.page_size], position % case.page_size
        last = int(starts[row + 1])
        seeing = slice(last - int(mask.any(1).sum()), last)
        if len(position):
            key = (keys.float()[page_ids, slots] * case.k_scale).to(query.dtype)
            value = (values.float()[page_ids, slots] * case.v_scale).to(query.dtype)
            out[seeing] = torch.nn.functional.scaled_dot_product_attention(
                query[seeing].transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
                attn_mask=mask[mask.any(1)][:, mask.any(0)],
                scale=operands.scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
    return out


def compare(case: Case, operands: Operands, kernel: Any) -> Errors:
    """Compare ``kernel`` on ``DEVICE``, with an output that is NaN before, to the reference in float64."""
    names = ("query",) if case.cache_dtype else ("query", "key_cache", "value_cache")
    wide = replace(operands, **{name: getattr(operands, name).double() for name in names})
    expected, expected_lse = reference.paged_attention(wide)
    uncapped, _ = reference.paged_attention(replace(wide, softcap=0.0))

    given = torch.full(expected.shape, NAN, dtype=case.dtype, device=DEVICE)
    on_device = {name: getattr(operands, name).to(DEVICE) for name in DIMENSIONS}
    out, lse = kernel(replace(operands, **on_device, out=given))
    if out is not given:
        raise AssertionError("the tensor given as out did not come back")
    out, lse = out.cpu().double(), lse.cpu().double()
    seen = expected_lse != float("-inf")
    return Errors(
        rms=rms(out - expected),
        sdpa_rms=rms(sdpa(case, operands).double() - uncapped),
        ulp=torch.finfo(case.dtype).eps * rms(expected),
        lse=(lse - expected_lse)[seen].abs().max().item() if seen.any() else 0.0,
        empty=bool(((lse == float("-inf")) == ~seen).all() and (out[~seen] == 0).all()),
    )


def measure(case: Case, splits: int | None, strides: str) -> Errors:
    """Errors of the prefill kernel, or with ``splits`` of the decode kernel."""
    from starling.attention_backends.kernels.triton import paged as triton_attention

    kernel = triton_attention.prefill_attention
    if splits is not None:
        kernel = functools.partial(triton_attention.decode_attention, splits=splits)
    return compare(case, make_operands(case, strides), kernel)
