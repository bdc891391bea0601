"""What the worker of the Triton tests runs: a case, by a kernel and by the reference, all in one process.

Only numbers go back to the test.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

from attention_backends.kernels import reference
from attention_backends.kernels.contract import page_views, visible_keys
from tests.kernels.cases import NAN, Case, rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def start_worker() -> None:
    """Before Triton is imported: without a GPU, its kernels run as Python. Memory that nobody wrote holds NaN."""
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Errors:
    """How far a kernel is from the reference.

    Attributes:
        rms: of the output's error; ``sdpa_rms`` that of torch's SDPA on the same numbers in the query's dtype.
        ulp: one, at the output's RMS.
        lse: largest absolute error of the log-sum-exp, over queries that see a key.
        empty: whether the queries that see none, and only they, have out 0 and lse -inf.
    """

    rms: float
    sdpa_rms: float
    ulp: float
    lse: float
    empty: bool


def rule(case: Case) -> dict[str, Any]:
    """Who sees what."""
    return {"causal": case.causal, "queries_per_key": case.queries_per_key, "window": case.window}


def operands(case: Case, strides: str) -> dict[str, torch.Tensor]:
    """The case's own, with what a window leaves behind freed: NaN, and whole pages another's in the block table."""
    tensors = case.tensors()
    keys, values = page_views(tensors["key_cache"], tensors["value_cache"], case.layout)
    null_page = next(page for page in range(len(keys)) if page not in tensors["block_table"])
    for row, (queries, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        first = visible_keys(0, queries, length, **rule(case))[0]
        for position in range(first):
            page = tensors["block_table"][row, position // case.page]
            keys[page, position % case.page] = values[page, position % case.page] = NAN
        tensors["block_table"][row, : first // case.page] = null_page
    for name in ("key_cache", "value_cache"):
        tensors[name] = restride(tensors[name], strides)
    return tensors


def restride(cache: torch.Tensor, strides: str) -> torch.Tensor:
    """The same pages in other memory: "heads first", or every second page of it only ("gaps")."""
    if strides == "heads first":
        return cache.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "gaps":
        return cache[:, None].expand(-1, 2, -1, -1, -1).contiguous()[:, 1]
    return cache


def sdpa(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """torch's own attention on the same numbers, in the query's dtype, row by row; it has no softcap."""
    query, starts = tensors["query"], tensors["query_start_loc"]
    keys, values = page_views(tensors["key_cache"], tensors["value_cache"], case.layout)
    out = query.new_zeros(len(query), query.shape[1], case.value_size)
    for row, (queries, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        mask = reference.visible_mask(queries, length, **rule(case))
        position = torch.arange(length)[mask.any(0)]
        page, slot = tensors["block_table"][row, position // case.page], position % case.page
        last = int(starts[row + 1])
        seeing = slice(last - int(mask.any(1).sum()), last)
        if len(position):
            key = (keys.float()[page, slot] * case.k_scale).to(query.dtype)
            value = (values.float()[page, slot] * case.v_scale).to(query.dtype)
            out[seeing] = torch.nn.functional.scaled_dot_product_attention(
                query[seeing].transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
                attn_mask=mask[mask.any(1)][:, mask.any(0)],
                scale=case.arguments()["scale"],
                enable_gqa=True,
            )[0].transpose(0, 1)
    return out


def compare(case: Case, tensors: dict[str, torch.Tensor], kernel: Any) -> Errors:
    """Run ``kernel`` on ``DEVICE``, its output poisoned before, against the reference in float64."""
    wide = {"query": tensors["query"].double()}
    if not case.cache_dtype:
        wide |= {name: tensors[name].double() for name in ("key_cache", "value_cache")}
    expected, expected_lse = reference.paged_attention(**(tensors | wide), **case.arguments())
    uncapped, _ = reference.paged_attention(**(tensors | wide), **(case.arguments() | {"softcap": 0.0}))

    poisoned = torch.full(expected.shape, NAN, dtype=case.dtype, device=DEVICE)
    on_device = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    out, lse = kernel(**on_device, **case.arguments(), out=poisoned)
    if out is not poisoned:
        raise AssertionError("the tensor given as out did not come back")
    out, lse = out.cpu().double(), lse.cpu().double()
    seen = expected_lse != float("-inf")
    return Errors(
        rms=rms(out - expected),
        sdpa_rms=rms(sdpa(case, tensors).double() - uncapped),
        ulp=torch.finfo(case.dtype).eps * rms(expected),
        lse=(lse - expected_lse)[seen].abs().max().item() if seen.any() else 0.0,
        empty=bool(((lse == float("-inf")) == ~seen).all() and (out[~seen] == 0).all()),
    )


def measure(case: Case, splits: int | None, strides: str) -> Errors:
    """The prefill kernel, or with ``splits`` that for decode."""
    from attention_backends.kernels import triton_decode, triton_prefill

    kernel = triton_prefill.paged_attention
    if splits is not None:
        kernel = functools.partial(triton_decode.paged_attention, splits=splits)
    return compare(case, operands(case, strides), kernel)
