"""What the worker of the Triton tests runs: a case made, computed and held against float64, all in one process.

Only numbers go back to the test.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from attention_backends.kernels import reference
from attention_backends.kernels.contract import Layout, page_views

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def start_worker() -> None:
    """Before Triton is imported: without a GPU, its kernels run as Python. Memory that nobody wrote holds NaN."""
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """Rows, sizes and options of one call; ``splits`` None is the prefill kernel, else decode with so many."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    page: int
    dtype: str = "float32"
    cache: str = ""
    causal: bool = True
    window: int | None = None
    softcap: float = 0.0
    k_scale: float = 1.0
    v_scale: float = 1.0
    order: str = "pages"
    splits: int | None = None


@dataclass(frozen=True)
class Errors:
    """How far a kernel is from the reference.

    Attributes:
        rms: of the output's error; ``sdpa_rms`` that of torch's SDPA on the same numbers in the query's dtype.
        ulp: one, at the output's RMS.
        lse: largest absolute error of the log-sum-exp, over queries that see a key.
        empty: whether the queries that see none, and only they, have out 0 and lse -inf.
        in_place: whether the tensor given as ``out`` came back.
    """

    rms: float
    sdpa_rms: float
    ulp: float
    lse: float
    empty: bool
    in_place: bool


def _cache(pages: int, case: Case, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(pages, page, KV heads, size) of NaN, with the strides that ``case.order`` asks for."""
    shape = (pages, case.page, case.kv_heads, size)
    if case.order == "heads first":
        return torch.full((pages, case.kv_heads, case.page, size), torch.nan).to(dtype).transpose(1, 2)
    if case.order == "gaps":
        return torch.full((pages, 2, *shape[1:]), torch.nan).to(dtype)[:, 1]
    return torch.full(shape, torch.nan).to(dtype)


def make(case: Case, seed: int) -> tuple[list[torch.Tensor], Layout]:
    """Operands of the call. Whatever no query may read is NaN, and stands in page 0 or past a row's keys."""
    torch.manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    cache_dtype = getattr(torch, case.cache or case.dtype)
    rows, columns = len(case.queries), max(max(case.keys) // case.page + 2, 2)
    pages = rows * columns + 1
    layout = Layout.PAGES
    if case.order == "cpu":
        layout = Layout.CPU
        memory = torch.full((pages, case.kv_heads, 2 * case.page, case.key_size), torch.nan).to(cache_dtype)
        key_cache, value_cache = memory.chunk(2, dim=2)
    else:
        key_cache = _cache(pages, case, case.key_size, cache_dtype)
        value_cache = _cache(pages, case, case.value_size, cache_dtype)
    table = torch.zeros(rows, columns, dtype=torch.int32)
    free = torch.randperm(pages - 1).add(1).tolist()
    keys, values = page_views(key_cache, value_cache, layout)
    for row, (queries, length) in enumerate(zip(case.queries, case.keys, strict=True)):
        first = 0
        if case.window is not None:
            first = max(0, (length - queries + 1 if case.causal else length) - case.window)
        for column in range(first // case.page, -(-length // case.page)):
            page = table[row, column] = free.pop()
            begin, end = max(first - column * case.page, 0), min(length - column * case.page, case.page)
            for cache in (keys, values):
                cache[page, begin:end] = torch.randn(end - begin, *cache.shape[2:]).to(cache_dtype)
    query = torch.randn(sum(case.queries), case.heads, case.key_size).to(dtype)
    starts = torch.tensor([0, *case.queries]).cumsum(0).int()
    operands = [query, key_cache, value_cache, table, starts, torch.tensor(case.keys, dtype=torch.int32)]
    return operands, layout


def sdpa(operands: list[torch.Tensor], case: Case, scale: float) -> torch.Tensor:
    """torch's own attention on ``operands`` (pages layout, float64), in the query's dtype; it has no softcap."""
    query, keys, values, table, starts, _ = operands
    dtype = getattr(torch, case.dtype)
    out = query.new_zeros(len(query), case.heads, case.value_size)
    for row, (queries, length) in enumerate(zip(case.queries, case.keys, strict=True)):
        pages = table[row, : -(-length // case.page)].long()
        key = (keys[pages].flatten(0, 1)[:length] * case.k_scale).to(dtype)
        value = (values[pages].flatten(0, 1)[:length] * case.v_scale).to(dtype)
        mask = reference.visible_mask(queries, length, causal=case.causal, window=case.window)
        mask = mask[mask.any(1)]
        last = int(starts[row + 1])
        seen = slice(last - len(mask), last)
        if len(mask):
            out[seen] = torch.nn.functional.scaled_dot_product_attention(
                query[seen].to(dtype).transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
    return out


def measure(case: Case, seed: int) -> Errors:
    """Run the case on ``DEVICE``, its output poisoned before."""
    from attention_backends.kernels import triton_decode, triton_prefill

    operands, layout = make(case, seed)
    scale = case.key_size**-0.5
    options = {name: getattr(case, name) for name in ("causal", "window", "softcap", "k_scale", "v_scale")}
    wide = [operands[0].double(), *page_views(*operands[1:3], layout), *operands[3:]]
    # The reference multiplies what no query may read by 0: not NaN, then.
    wide[1:3] = [cache.double().nan_to_num() for cache in wide[1:3]]
    expected, expected_lse = reference.paged_attention(*wide, scale=scale, **options)
    uncapped, _ = reference.paged_attention(*wide, scale=scale, **(options | {"softcap": 0.0}))

    poisoned = torch.full(expected.shape, torch.nan, dtype=operands[0].dtype, device=DEVICE)
    call = triton_prefill.paged_attention
    if case.splits is not None:
        call = functools.partial(triton_decode.paged_attention, splits=case.splits)
    on_device = [operand.to(DEVICE) for operand in operands]
    out, lse = call(*on_device, scale=scale, layout=layout, out=poisoned, **options)
    in_place = out is poisoned
    out, lse = out.cpu().double(), lse.cpu().double()
    seen = expected_lse != float("-inf")
    return Errors(
        rms=rms(out - expected),
        sdpa_rms=rms(sdpa(wide, case, scale) - uncapped),
        ulp=torch.finfo(operands[0].dtype).eps * rms(expected),
        lse=(lse - expected_lse)[seen].abs().max().item() if seen.any() else 0.0,
        empty=bool(((lse == float("-inf")) == ~seen).all() and (out[~seen] == 0).all()),
        in_place=in_place,
    )


def rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()
