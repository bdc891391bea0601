"""The three paged caches of an Attamba layer, on vLLM's own cache manager. Their pages have equal bytes.

A page has the bytes of 17 rows of K|V (2 x head size x heads values). 16 rows are the cache's own. The 17th row of the
first page of a request's states holds the state of token 0: state number 0 is that of the first chunk after token 0.

    states   K|V of each chunk's last token     16 P tokens per page: FullAttentionSpec with tokens_per_state P
    window   K|V of the last L + 1 tokens       16 tokens per page: SlidingWindowSpec
    rows     [u B C | dt] of the open chunk     a power of 2 of tokens per page: SlidingWindowSpec
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec

from starling.attention_backends.attamba.attamba_backend import AttambaBackend
from starling.attention_backends.attamba.chunks import PAGE_ROWS
from starling.attention_backends.kernels.contract import Layout, page_views
from starling.vllm_compat.models import register_layer


class KvPages:
    """Views of the pages of one cache.

    Args:
        pages: (num_pages, 17, 2 x heads x head size).
        heads: of K, and of V.
        layout: of ``keys`` and ``values``; by default that of the pages' device.

    Attributes:
        keys, values: the first 16 rows of each page, for ``paged_attention``.
        key_rows, value_rows: the same memory as (num_pages, 16, heads, head size), to write to.
        last_rows: (num_pages, 2 x heads x head size), the 17th row of each page.
    """

    def __init__(self, pages: torch.Tensor, heads: int, layout: Layout | None = None) -> None:
        width = pages.shape[-1] // 2
        size, start = width // heads, pages.storage_offset()
        self.last_rows = pages[:, PAGE_ROWS]
        self.layout = layout or (Layout.CPU if pages.device.type == "cpu" else Layout.PAGES)
        if self.layout is Layout.CPU:
            shape = (len(pages), heads, PAGE_ROWS, size)
            strides = (pages.stride(0), 2 * PAGE_ROWS * size, size, 1)
            self.keys = pages.as_strided(shape, strides, start)
            self.values = pages.as_strided(shape, strides, start + PAGE_ROWS * size)
        else:
            rows = pages[:, :PAGE_ROWS].unflatten(-1, (2, heads, size))
            self.keys, self.values = rows.unbind(2)
        self.key_rows, self.value_rows = page_views(self.keys, self.values, self.layout)

    def write(self, page_ids: torch.Tensor, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store key and value (T, heads, head size) at rows ``rows`` (T,) of the pages ``page_ids`` (T,)."""
        self.key_rows[page_ids, rows] = key
        self.value_rows[page_ids, rows] = value

    def write_last(self, page_ids: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store key and value (T, heads, head size) in the 17th rows of the pages ``page_ids`` (T,)."""
        self.last_rows[page_ids] = torch.cat([key, value], 1).flatten(1)


def locate(
    table: torch.Tensor, request: torch.Tensor, row: torch.Tensor, page_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page ids, and rows within these pages, of the rows ``row`` of requests, which are broadcast.

    Args:
        table: (R, columns) int32, the block table.
        page_rows: rows of a page.
    """
    return table[request, row // page_rows].long(), row % page_rows


CHUNK_SIZES, WINDOW_SIZES = (2, 128), (1, 256)
"""Smallest and largest P and L that are served."""


def cache_specs(
    chunk_size: int, window: int, width: int, local_dim: int, dtype: torch.dtype
) -> dict[str, AttentionSpec]:
    """Specs of the three caches of a layer, by the names in the module's docstring.

    Args:
        chunk_size, window: P and L in tokens.
        width: values of a token that the scans of its chunk read, over both mixers.
        local_dim: of K, and of V, on one tensor-parallel rank.
        dtype: of the caches.

    Raises:
        ValueError: a size that the caches do not support.
    """
    sizes = (("token_chunk", chunk_size, CHUNK_SIZES), ("leading_tokens", window, WINDOW_SIZES))
    for name, value, (minimum, maximum) in sizes:
        if not minimum <= value <= maximum:
            raise ValueError(f"{name}={value} is refused: no cache supports it. Allowed: {minimum} to {maximum}")
    values = (PAGE_ROWS + 1) * 2 * local_dim  # of a page
    if width > values:
        raise ValueError(
            f"ssm_inner and ssm_state_dim are refused: the mixers read {width} values of a token, more than a page of "
            f"K and V holds on each rank. Allowed: at most {values}, which is {PAGE_ROWS + 1} times "
            "hidden_size divided by tensor_parallel_size, for K and for V"
        )
    common: dict[str, Any] = {"num_kv_heads": 1, "dtype": dtype, "page_size_padded": values * dtype.itemsize}
    both: dict[str, Any] = {"head_size": local_dim, "head_size_v": local_dim}
    states = FullAttentionSpec(block_size=PAGE_ROWS * chunk_size, tokens_per_state=chunk_size, **both, **common)
    windows = SlidingWindowSpec(block_size=PAGE_ROWS, sliding_window=window + 1, **both, **common)
    # A power of 2, because prefix hits end where pages of all three caches do.
    tokens = 1 << ((values // width).bit_length() - 1)
    rows = SlidingWindowSpec(block_size=tokens, sliding_window=chunk_size, head_size=width, head_size_v=0, **common)
    return {"states": states, "window": windows, "rows": rows}


def layer_specs(config: Any, dtype: torch.dtype, ranks: int = 1) -> dict[str, AttentionSpec]:
    """``cache_specs`` of a layer of a model on one tensor-parallel rank; see ``model_specs``."""
    local_dim = config.hidden_size // ranks
    return cache_specs(config.token_chunk, config.leading_tokens, config.mixer_sizes.row, local_dim, dtype)


def model_specs(config: Any, dtype: torch.dtype, ranks: int = 1) -> dict[str, AttentionSpec]:
    """Specs of all caches of a model on one tensor-parallel rank, by layer and name.

    Args:
        config: AttambaConfig.
        dtype: of the caches.
        ranks: number of tensor-parallel ranks.

    Raises:
        ValueError: a size that the caches do not support.
    """
    specs = layer_specs(config, dtype, ranks)
    return {f"layers.{layer}.{name}": spec for layer in range(config.num_hidden_layers) for name, spec in specs.items()}


Views = TypeVar("Views")


class PagedRows(nn.Module, AttentionLayerBase):
    """One cache of one layer. vLLM allocates the cache by its spec and binds it to ``kv_cache``."""

    _views: Any

    def __init__(self, spec: AttentionSpec, prefix: str) -> None:
        super().__init__()
        self.spec, self.prefix = spec, prefix
        self.kv_cache = torch.tensor([])
        register_layer(get_current_vllm_config(), prefix, self)

    @property
    def kv_cache(self) -> torch.Tensor:
        """(num_pages, 1, row values), of which vLLM binds another when it has profiled the memory."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, tensor: torch.Tensor) -> None:
        self._kv_cache, self._views = tensor, None

    def get_attn_backend(self) -> type[AttentionBackend]:
        return AttambaBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        return self.spec

    @property
    def rows(self) -> int:
        """Rows of a page: the tokens of a page of rows, and 17 of K|V."""
        return self.spec.block_size if not self.spec.head_size_v else PAGE_ROWS + 1

    @property
    def pages(self) -> torch.Tensor:
        """(num_pages, rows, row values)."""
        cache = self.kv_cache
        width = cache.shape[-1]
        return cache.as_strided((cache.shape[0], self.rows, width), (cache.stride(0), width, 1))

    def views(self, make: Callable[[torch.Tensor], Views]) -> Views:
        """``make(self.pages)``, made once for the tensor that vLLM has bound."""
        if self._views is None:
            self._views = make(self.pages)
        return self._views

    def scratch_page(self, device: torch.device) -> torch.Tensor:
        """(1, rows, row values), a page of zeros like those of ``pages``, for runs without a cache."""
        width = self.spec.num_kv_heads * (self.spec.head_size + self.spec.head_size_v)
        return torch.zeros(1, self.rows, width, dtype=self.spec.dtype, device=device)
