"""The three paged caches of an Attamba layer, on vLLM's own cache manager. Their pages have equal bytes.

A page has the bytes of 17 rows of K|V (2 x head size x heads values). 16 rows are the cache's own. The 17th row of the
first page of a request's states holds the state of token 0: state number 0 is that of the first chunk after token 0.

    states   K|V of each chunk's last token     16 P tokens per page: FullAttentionSpec with tokens_per_state P
    window   K|V of the last L + 1 tokens       16 tokens per page: SlidingWindowSpec
    rows     normed inputs of the open chunk    32 tokens per page, fewer if ranks split K|V: SlidingWindowSpec
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec

from attention_backends.attamba.backend import AttambaBackend
from attention_backends.attamba.chunks import PAGE_ROWS
from attention_backends.attamba.pages import KvPages
from vllm_compat.models import register_layer

CHUNK_SIZES, WINDOW_SIZES = (2, 128), (1, 256)
"""Smallest and largest P and L that are served."""


def check_sizes(chunk_size: int, window: int, dim: int, local_dim: int) -> None:
    """Check that the caches support a model's sizes.

    Args:
        chunk_size, window: P and L in tokens.
        dim: of the model.
        local_dim: of K, and of V, on one tensor-parallel rank.

    Raises:
        ValueError: a size that the caches do not support.
    """
    sizes = (("token_chunk", chunk_size, CHUNK_SIZES), ("leading_tokens", window, WINDOW_SIZES))
    for name, value, (minimum, maximum) in sizes:
        if not minimum <= value <= maximum:
            raise ValueError(f"{name}={value} is refused: no cache supports it. Allowed: {minimum} to {maximum}")
    if 2 * PAGE_ROWS * local_dim % dim:
        raise ValueError(
            f"hidden_size={dim} is refused: a page of K and V of {local_dim} values on each rank does not hold a whole "
            f"number of inputs. Allowed: tensor parallelism that splits K and V at most {2 * PAGE_ROWS} ways"
        )


def cache_specs(chunk_size: int, window: int, dim: int, local_dim: int, dtype: torch.dtype) -> dict[str, AttentionSpec]:
    """Specs of the three caches of a layer, by the names in the module's docstring.

    Args:
        chunk_size, window, dim, local_dim: see ``check_sizes``.
        dtype: of the caches.

    Raises:
        ValueError: a size that the caches do not support.
    """
    check_sizes(chunk_size, window, dim, local_dim)
    page_bytes = (PAGE_ROWS + 1) * 2 * local_dim * dtype.itemsize
    common: dict[str, Any] = {"num_kv_heads": 1, "dtype": dtype, "page_size_padded": page_bytes}
    both: dict[str, Any] = {"head_size": local_dim, "head_size_v": local_dim}
    states = FullAttentionSpec(block_size=PAGE_ROWS * chunk_size, tokens_per_state=chunk_size, **both, **common)
    windows = SlidingWindowSpec(block_size=PAGE_ROWS, sliding_window=window + 1, **both, **common)
    rows = SlidingWindowSpec(
        block_size=2 * PAGE_ROWS * local_dim // dim, sliding_window=chunk_size, head_size=dim, head_size_v=0, **common
    )
    return {"states": states, "window": windows, "rows": rows}


def model_specs(config: Any, dtype: torch.dtype, ranks: int = 1) -> dict[str, AttentionSpec]:
    """Specs of all caches of a model on one tensor-parallel rank, by layer and name.

    Args:
        config: AttambaConfig.
        dtype: of the caches.
        ranks: number of tensor-parallel ranks.

    Raises:
        ValueError: a size that the caches do not support.
    """
    local_dim = config.hidden_size // ranks
    specs = cache_specs(config.token_chunk, config.leading_tokens, config.hidden_size, local_dim, dtype)
    return {f"layers.{layer}.{name}": spec for layer in range(config.num_hidden_layers) for name, spec in specs.items()}


class PagedRows(nn.Module, AttentionLayerBase):
    """One cache of one layer. vLLM allocates the cache by its spec and binds it to ``kv_cache``."""

    def __init__(self, spec: AttentionSpec, prefix: str) -> None:
        super().__init__()
        self.spec, self.prefix = spec, prefix
        self.kv_cache = torch.tensor([])
        self._kv: tuple[torch.Tensor, KvPages] | None = None
        register_layer(get_current_vllm_config(), prefix, self)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return AttambaBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        return self.spec

    @property
    def pages(self) -> torch.Tensor:
        """(num_pages, rows, row values): all whole rows that the bytes of a page hold, the 17th row included."""
        cache = self.kv_cache
        width = cache.shape[-1]
        rows = self.spec.page_size_bytes // (width * cache.element_size())
        return cache.as_strided((cache.shape[0], rows, width), (cache.stride(0), width, 1))

    def scratch_page(self, device: torch.device) -> torch.Tensor:
        """(1, rows, row values), a page of zeros like those of ``pages``, for runs without a cache."""
        width = self.spec.num_kv_heads * (self.spec.head_size + self.spec.head_size_v)
        rows = self.spec.page_size_bytes // (width * self.spec.dtype.itemsize)
        return torch.zeros(1, rows, width, dtype=self.spec.dtype, device=device)

    def kv_pages(self, heads: int) -> KvPages:
        """Views of a cache of K|V, made once for the tensor that vLLM has bound."""
        if self._kv is None or self._kv[0] is not self.kv_cache:
            self._kv = self.kv_cache, KvPages(self.pages, heads)
        return self._kv[1]
