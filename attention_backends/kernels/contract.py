"""What every paged attention of this folder computes, and the checks they share.

    paged_attention(query, key_cache, value_cache, block_table, query_start_loc, seq_lens, *, scale, causal=True,
                    queries_per_key=1, window=None, softcap=0.0, k_scale=1.0, v_scale=1.0, out=None,
                    layout=Layout.PAGES) -> (out, lse)

Row r has the q query tokens ``query_start_loc[r]`` to ``query_start_loc[r + 1]`` and ``s = seq_lens[r]`` keys, key k of
which lies in page ``block_table[r, k // page]`` at ``k % page``. Its query i sees the keys of ``visible_keys``:
causal, those up to its own position ``s - q + i`` (bottom-right aligned), else all; of these the last ``window``. Where
a key stands for n tokens (``queries_per_key``), causal is a staircase of n queries a step, and the last one sees all.
A query that sees no key has out 0 and lse -inf.

    score[k] = scale * k_scale * (query . key[k]);  if softcap: score = softcap * tanh(score / softcap)
    lse = log(sum over k of exp(score[k]))          natural logarithm, after the cap
    out = v_scale * sum over k of exp(score[k] - lse) * value[k]

Args:
    query: (T, H, D) float; H is a multiple of KV heads, and head h reads KV head ``h // (H // KV heads)``.
    key_cache, value_cache: laid out as ``layout`` says, in query's dtype or in fp8 (see ``as_fp8``); their head sizes D
        and Dv may differ.
    block_table: (R, C) int32. Columns past a row's keys may hold anything, and so may the cache where no query of the
        row sees a key.
    query_start_loc: (R + 1,) int32, from 0, not falling, to T.
    seq_lens: (R,) int32, keys of each row, its own query tokens included where causal; may be 0.
    queries_per_key: n, at least 1: causal, the query j before the row's last sees ``j // n`` keys fewer than it.
    scale: factor of the scores; ``k_scale`` and ``v_scale`` are those of a quantised cache.
    window: keys that a query sees at most, at least 1; None for all.
    softcap: 0 for none.
    out: (T, H, Dv) in query's dtype to write to; made where None.

Returns:
    out (T, H, Dv) in query's dtype, lse (T, H) float32; float64 where query is float64, in what computes in it.

Raises:
    ValueError: operands that do not fit one another, or that the implementation does not take.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

FP8_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class Layout(StrEnum):
    """How pages are laid out.

    PAGES: keys (pages, page, KV heads, D), values (pages, page, KV heads, Dv), any strides: vLLM's GPU backends.
    CPU: vLLM's CPU backend, a kv_cache (pages, KV heads, 2 * page, D) chunked in two at dim 2. Values are (pages,
        KV heads, page, D) as they look. Keys look the same, but the memory of each page and head is (D, page): that is
        what the instruction sets "vec" and "vec16" of `cpu_attn_reshape_and_cache` write, in every dtype.
    """

    PAGES = "pages"
    CPU = "cpu"


CPU_ISAS = ("vec", "vec16")


def cpu_layout(isa: str) -> Layout:
    """The layout that vLLM's CPU backend writes with an instruction set of `_get_attn_isa`.

    On x86 that is "amx" for bf16 where the processor has AMX tiles, else "vec", or "vec16" for pages and head sizes
    that are no multiple of 32.
    """
    if isa not in CPU_ISAS:
        raise ValueError(
            f"isa={isa!r}: it stores keys in an order of its own, known for {', '.join(CPU_ISAS)} only "
            "(on x86, processors without AMX, or caches other than bf16)"
        )
    return Layout.CPU


def as_fp8(cache: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """vLLM's uint8 cache as the float8 of its ``kv_cache_dtype``; implementations take that, never raw bytes."""
    if kv_cache_dtype not in FP8_DTYPES:
        raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r} is not one of {', '.join(FP8_DTYPES)}")
    return cache.view(FP8_DTYPES[kv_cache_dtype])


def page_views(key_cache: torch.Tensor, value_cache: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Both caches as (pages, page, KV heads, head size), whatever the layout; views of the same memory."""
    if layout is Layout.PAGES:
        return key_cache, value_cache
    page, size = key_cache.shape[2:]
    if key_cache.stride()[2:] != (size, 1):
        raise ValueError(f"key_cache with strides {key_cache.stride()}: layout {layout.value} needs whole pages a head")
    keys = key_cache.as_strided((*key_cache.shape[:2], page, size), (*key_cache.stride()[:2], 1, page))
    return keys.transpose(1, 2), value_cache.transpose(1, 2)


@dataclass(frozen=True)
class Sizes:
    """The numbers of a call: rows R, query tokens T, heads, head sizes, tokens of a page."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    page: int


def visible_keys(
    query: int, queries: int, keys: int, *, causal: bool, queries_per_key: int = 1, window: int | None
) -> tuple[int, int]:
    """[first, end) of the keys that query number ``query`` of a row sees; first == end where none.

    Args:
        query: its number in the row, from 0; ``queries`` and ``keys`` are the row's.
    """
    end = max(0, keys - (queries - 1 - query) // queries_per_key) if causal else keys
    return (0 if window is None else max(0, end - window)), end


def check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    queries_per_key: int = 1,
    window: int | None,
    softcap: float,
    out: torch.Tensor | None,
    layout: Layout,
) -> Sizes:
    """Refuse operands outside the contract, by shape and dtype alone: no value is read from a device."""
    shapes = {"query": (query, 3), "key_cache": (key_cache, 4), "value_cache": (value_cache, 4)}
    shapes |= {"block_table": (block_table, 2), "query_start_loc": (query_start_loc, 1), "seq_lens": (seq_lens, 1)}
    for name, (tensor, dims) in shapes.items():
        if tensor.dim() != dims:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: it has {dims} dimensions")
    for name in ("block_table", "query_start_loc", "seq_lens"):
        if shapes[name][0].dtype != torch.int32:
            raise ValueError(f"{name} is {shapes[name][0].dtype}, not torch.int32")
    keys, values = page_views(key_cache, value_cache, layout)
    (tokens, heads, key_size), (page, kv_heads) = query.shape, keys.shape[1:3]
    rows, value_size = len(seq_lens), values.shape[3]
    if keys.shape[3] != key_size or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"key_cache {tuple(key_cache.shape)} and value_cache {tuple(value_cache.shape)} in layout {layout.value} "
            f"do not fit each other and head size {key_size}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} KV heads")
    if len(block_table) != rows or len(query_start_loc) != rows + 1:
        raise ValueError(
            f"{rows} rows in seq_lens, {len(block_table)} in block_table, {len(query_start_loc) - 1} in query_start_loc"
        )
    if keys.dtype != values.dtype or keys.dtype not in (query.dtype, *FP8_DTYPES.values()):
        raise ValueError(f"keys {keys.dtype}, values {values.dtype}: both in query's {query.dtype}, or both in one fp8")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: at least 1, or None for all keys")
    if queries_per_key < 1:
        raise ValueError(f"queries_per_key={queries_per_key}: at least 1")
    if softcap < 0:
        raise ValueError(f"softcap={softcap}: positive, or 0 for none")
    if out is not None and (out.shape != (tokens, heads, value_size) or out.dtype != query.dtype):
        raise ValueError(
            f"out {tuple(out.shape)} {out.dtype}: query and values ask for {(tokens, heads, value_size)} {query.dtype}"
        )
    return Sizes(rows, tokens, heads, kv_heads, key_size, value_size, page)
