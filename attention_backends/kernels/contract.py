"""The contract of paged attention: what every implementation of this folder computes, and the operands they share.

    paged_attention(operands: Operands) -> (out, lse)

Row r has the q query tokens ``query_start_loc[r]`` to ``query_start_loc[r + 1]`` and ``s = seq_lens[r]`` keys. Key k of
the row is in page ``block_table[r, k // page_size]`` at slot ``k % page_size``. Query i of the row sees the keys that
``visible_keys`` returns. With ``causal``, these are the keys up to the query's own position ``s - q + i`` (aligned
bottom-right), else all keys. A window keeps only the last ``window`` of them. Where one key represents n tokens
(``queries_per_key``), the causal mask is a staircase of n queries per step, and the row's last query sees all keys.
A query that sees no key has out 0 and lse -inf.

Rows may compute some KV heads only (``row_heads``). ``query_start_loc`` then goes over the T query tokens n times: the
rows' token i is query token ``i % T``. Each head of each query token is computed by one row.

    score[k] = scale * k_scale * (query . key[k]);  if softcap: score = softcap * tanh(score / softcap)
    lse = log(sum over k of exp(score[k]))          natural logarithm, after the cap
    out = v_scale * sum over k of exp(score[k] - lse) * value[k]

Returns:
    out (T, H, Dv) in the query's dtype, lse (T, H) float32. Implementations that compute in float64 return a float64
    lse for a float64 query.

Raises:
    ValueError: the implementation does not support the operands.
"""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum

import torch

FP8_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

CPU_ISAS = ("vec", "vec16")
"""Instruction sets of vLLM's `_get_attn_isa` whose caches have ``Layout.CPU``; each other one has its own key order.

On x86, vLLM takes "amx" for bf16 where the processor has AMX tiles. Else it takes "vec", or "vec16" for page sizes and
head sizes that are no multiple of 32.
"""

AMX = "amx"
"""The instruction set of processors with AMX tiles, for bf16; "vec" runs there too."""


class Layout(StrEnum):
    """Memory layout of a page.

    PAGES: keys (pages, page size, KV heads, D), values (pages, page size, KV heads, Dv), any strides: vLLM's GPU
        backends.
    CPU: vLLM's CPU backend, a kv_cache (pages, KV heads, 2 * page size, D) chunked in two at dim 2. Values are (pages,
        KV heads, page size, D) in shape and memory. Keys have the same shape, but the memory of each page and head is
        (D, page size): `cpu_attn_reshape_and_cache` writes this with the instruction sets of ``CPU_ISAS``, in every
        dtype.
    """

    PAGES = "pages"
    CPU = "cpu"


def as_fp8(cache: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """View vLLM's uint8 cache in the float8 dtype of its ``kv_cache_dtype``, which implementations take.

    Raises:
        ValueError: ``kv_cache_dtype`` is not an fp8 dtype.
    """
    if kv_cache_dtype not in FP8_DTYPES:
        raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r} is not one of {', '.join(FP8_DTYPES)}")
    return cache.view(FP8_DTYPES[kv_cache_dtype])


def page_views(key_cache: torch.Tensor, value_cache: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """View both caches as (pages, page size, KV heads, head size), whatever their layout; no memory is copied.

    Raises:
        ValueError: in layout CPU, the keys of a page and head are not contiguous.
    """
    if layout is Layout.PAGES:
        return key_cache, value_cache
    page_size, size = key_cache.shape[2:]
    if key_cache.stride()[2:] != (size, 1):
        raise ValueError(f"key_cache with strides {key_cache.stride()}: layout {layout.value} needs whole pages a head")
    keys = key_cache.as_strided((*key_cache.shape[:2], page_size, size), (*key_cache.stride()[:2], 1, page_size))
    return keys.transpose(1, 2), value_cache.transpose(1, 2)


def visible_keys(
    query: int, queries: int, keys: int, *, causal: bool, queries_per_key: int = 1, window: int | None
) -> tuple[int, int]:
    """Return the range [first, end) of a row's keys that a query of the row sees; first == end if it sees none.

    Args:
        query: index of the query in its row, from 0.
        queries: query tokens of the row.
        keys: keys of the row.
    """
    end = max(0, keys - (queries - 1 - query) // queries_per_key) if causal else keys
    return (0 if window is None else max(0, end - window)), end


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call: rows R, query tokens T, heads, head sizes, tokens per page."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    page_size: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, eq=False)
class Operands:
    """The operands of one call, validated when the object is made.

    The validation reads shapes, strides and dtypes, but no tensor's values, so a CUDA graph can capture a call.

    Args:
        query: (T, H, D) float. H is a multiple of the KV heads; head h reads KV head ``h // (H // KV heads)``.
        key_cache, value_cache: caches in ``layout``, both in the query's dtype or both in fp8 (see ``as_fp8``).
            Their head sizes D and Dv may differ.
        block_table: (R, C) int32. Columns past a row's keys may hold anything, and so may the cache where no query of
            the row sees a key.
        query_start_loc: (R + 1,) int32, non-decreasing from 0 to T, or with ``row_heads`` to a multiple of T. It may
            end before T: the tokens after it are padding, whose out is not written and whose lse may be anything.
        seq_lens: (R,) int32, keys of each row, which may be 0. With ``causal`` they include the row's query tokens.
        scale: factor of the scores.
        causal: whether a query sees the keys up to its own position only.
        queries_per_key: n, at least 1. With ``causal``, the query j before the row's last sees ``j // n`` keys fewer.
        window: maximum number of keys that a query sees, at least 1, or None if it sees all.
        softcap: cap of the scores, or 0 if there is none.
        k_scale, v_scale: scales of a quantised cache.
        out: (T, H, Dv) in the query's dtype to write to, or None to make a new one.
        layout: layout of both caches.
        row_heads: (R, KV heads) bool, contiguous, the heads that each row computes, or None if each row computes all.

    Raises:
        ValueError: the operands do not fit one another, or a number is out of its range.
    """

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    _: KW_ONLY
    scale: float
    causal: bool = True
    queries_per_key: int = 1
    window: int | None = None
    softcap: float = 0.0
    k_scale: float = 1.0
    v_scale: float = 1.0
    out: torch.Tensor | None = None
    layout: Layout = Layout.PAGES
    row_heads: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._check_dimensions()
        self._check_fit()
        self._check_numbers()

    @functools.cached_property
    def _views(self) -> tuple[torch.Tensor, torch.Tensor]:
        return page_views(self.key_cache, self.value_cache, self.layout)

    @property
    def keys(self) -> torch.Tensor:
        """The key cache as (pages, page size, KV heads, D)."""
        return self._views[0]

    @property
    def values(self) -> torch.Tensor:
        """The value cache as (pages, page size, KV heads, Dv)."""
        return self._views[1]

    @functools.cached_property
    def sizes(self) -> Sizes:
        (tokens, heads, key_size), (page_size, kv_heads) = self.query.shape, self.keys.shape[1:3]
        return Sizes(len(self.seq_lens), tokens, heads, kv_heads, key_size, self.values.shape[3], page_size)

    def make_out(self) -> torch.Tensor:
        """``out``, or a new tensor of its shape and dtype where it is None."""
        if self.out is not None:
            return self.out
        return self.query.new_empty(self.sizes.tokens, self.sizes.heads, self.sizes.value_size)

    def make_lse(self) -> torch.Tensor:
        """Return a new (T, H) tensor for the log-sum-exp: float64 if the query is float64, else float32."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.new_empty(self.sizes.tokens, self.sizes.heads, dtype=dtype)

    def _check_dimensions(self) -> None:
        for name, dims in DIMENSIONS.items():
            tensor = getattr(self, name)
            if tensor.dim() != dims:
                raise ValueError(f"{name} of shape {tuple(tensor.shape)}: it has {dims} dimensions")
        for name in ("block_table", "query_start_loc", "seq_lens"):
            dtype = getattr(self, name).dtype
            if dtype != torch.int32:
                raise ValueError(f"{name} is {dtype}, not torch.int32")

    def _check_fit(self) -> None:
        query, keys, values, sizes = self.query, self.keys, self.values, self.sizes
        if keys.shape[3] != sizes.key_size or keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"key_cache {tuple(self.key_cache.shape)} and value_cache {tuple(self.value_cache.shape)} in layout "
                f"{self.layout.value} do not fit each other and head size {sizes.key_size}"
            )
        if sizes.kv_heads == 0 or sizes.heads % sizes.kv_heads:
            raise ValueError(f"{sizes.heads} query heads are no multiple of {sizes.kv_heads} KV heads")
        table_rows, start_rows = len(self.block_table), len(self.query_start_loc) - 1
        if table_rows != sizes.rows or start_rows != sizes.rows:
            raise ValueError(
                f"{sizes.rows} rows in seq_lens, {table_rows} in block_table, {start_rows} in query_start_loc"
            )
        heads = self.row_heads
        if heads is not None and (heads.shape != (sizes.rows, sizes.kv_heads) or heads.dtype != torch.bool):
            raise ValueError(
                f"row_heads {tuple(heads.shape)} {heads.dtype}: a bool for each of {sizes.rows} rows and "
                f"{sizes.kv_heads} KV heads"
            )
        if keys.dtype != values.dtype or keys.dtype not in (query.dtype, *FP8_DTYPES.values()):
            raise ValueError(
                f"keys {keys.dtype}, values {values.dtype}: both in query's {query.dtype}, or both in one fp8"
            )
        shape = (sizes.tokens, sizes.heads, sizes.value_size)
        if self.out is not None and (self.out.shape != shape or self.out.dtype != query.dtype):
            raise ValueError(
                f"out {tuple(self.out.shape)} {self.out.dtype}: query and values need {shape} {query.dtype}"
            )

    def _check_numbers(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: at least 1, or None for all keys")
        if self.queries_per_key < 1:
            raise ValueError(f"queries_per_key={self.queries_per_key}: at least 1")
        if self.softcap < 0:
            raise ValueError(f"softcap={self.softcap}: positive, or 0 for none")


DIMENSIONS = {"query": 3, "key_cache": 4, "value_cache": 4, "block_table": 2, "query_start_loc": 1, "seq_lens": 1}


@dataclass(frozen=True, eq=False)
class Rotation:
    """A layer's rotary embedding, as far as rotating a query takes it.

    Attributes:
        cos, sin: (positions, R / 2) float32, of the angles by which a position rotates the first R elements of a head.
        is_neox_style: whether elements i and i + R / 2 are a pair, else 2 i and 2 i + 1.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    is_neox_style: bool


NO_ROTATION = Rotation(torch.ones(1, 0), torch.zeros(1, 0), True)
"""For queries that are not re-rotated: it has position 0 alone, and rotates no element."""


def rotate_back(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool) -> torch.Tensor:
    """Rotate query tokens back.

    Args:
        query: (T, H, D).
        cos, sin: (T, R / 2) float32, of the angles; elements behind the first R of a head stay.

    Returns:
        A new (T, H, D) in the query's dtype; computed in float32.
    """
    pairs = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    rerotated = query.float()
    if is_neox_style:
        first, second = rerotated[..., :pairs], rerotated[..., pairs : 2 * pairs]
        parts = [first * cos + second * sin, second * cos - first * sin, rerotated[..., 2 * pairs :]]
        return torch.cat(parts, -1).to(query.dtype)
    first, second = rerotated[..., : 2 * pairs : 2], rerotated[..., 1 : 2 * pairs : 2]
    rotated = torch.stack([first * cos + second * sin, second * cos - first * sin], -1).flatten(-2)
    return torch.cat([rotated, rerotated[..., 2 * pairs :]], -1).to(query.dtype)


def uses_triton(device: torch.device) -> bool:
    """Return whether Triton's kernels compute tensors on a device."""
    return device.type != "cpu"
