"""The three paged caches of an Attamba layer, as vLLM's own cache manager holds them, with pages of equal bytes.

A page of each is 17 rows of K|V (2 x head size x heads values): 16 of a cache's own, and one more, so that the first
page of a request's states has a place for token 0's, which would else fall on the first chunk's.

    states   K|V of each chunk's last token     16 P tokens a page: FullAttentionSpec with tokens_per_state P
    window   K|V of the last L + 1 tokens       16 tokens a page: SlidingWindowSpec
    rows     normed inputs of the open chunk    32 tokens a page, fewer where K|V is split over ranks: the same
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
from engine_ext import compat

CHUNKS, WINDOWS = (2, 128), (1, 256)


def check_sizes(chunk: int, window: int, dim: int, local_dim: int) -> None:
    """Refuse sizes that the caches can't carry (raises ValueError).

    Args:
        dim: of the model; ``local_dim``: of K, or V, on one tensor-parallel rank.
    """
    for name, value, (least, most) in (("token_chunk", chunk, CHUNKS), ("leading_tokens", window, WINDOWS)):
        if not least <= value <= most:
            raise ValueError(f"{name}={value} is refused: it is served from {least} to {most}")
    if 2 * PAGE_ROWS * local_dim % dim:
        raise ValueError(
            f"hidden_size={dim} is refused: K and V of {local_dim} values on each rank make no whole page of inputs; "
            f"tensor parallelism may split them {2 * PAGE_ROWS} ways at most"
        )


def cache_specs(chunk: int, window: int, dim: int, local_dim: int, dtype: torch.dtype) -> dict[str, AttentionSpec]:
    """Specs of the three caches of a layer, by name, as above (raises ValueError, see ``check_sizes``)."""
    check_sizes(chunk, window, dim, local_dim)
    page_bytes = (PAGE_ROWS + 1) * 2 * local_dim * dtype.itemsize
    common: dict[str, Any] = {"num_kv_heads": 1, "dtype": dtype, "page_size_padded": page_bytes}
    both: dict[str, Any] = {"head_size": local_dim, "head_size_v": local_dim}
    states = FullAttentionSpec(block_size=PAGE_ROWS * chunk, tokens_per_state=chunk, **both, **common)
    windows = SlidingWindowSpec(block_size=PAGE_ROWS, sliding_window=window + 1, **both, **common)
    rows = SlidingWindowSpec(
        block_size=2 * PAGE_ROWS * local_dim // dim, sliding_window=chunk, head_size=dim, head_size_v=0, **common
    )
    return {"states": states, "window": windows, "rows": rows}


def model_specs(config: Any, dtype: torch.dtype, ranks: int = 1) -> dict[str, AttentionSpec]:
    """Specs of all caches of a model on one of its tensor-parallel ranks, by layer and name.

    Args:
        config: AttambaConfig.
    """
    local_dim = config.hidden_size // ranks
    specs = cache_specs(config.token_chunk, config.leading_tokens, config.hidden_size, local_dim, dtype)
    return {f"layers.{layer}.{name}": spec for layer in range(config.num_hidden_layers) for name, spec in specs.items()}


class PagedRows(nn.Module, AttentionLayerBase):
    """One cache of one layer: vLLM allocates it by its spec and binds it here."""

    def __init__(self, spec: AttentionSpec, prefix: str) -> None:
        super().__init__()
        self.spec, self.prefix = spec, prefix
        self.kv_cache = torch.tensor([])
        self._kv: tuple[torch.Tensor, KvPages] | None = None
        compat.register_layer(get_current_vllm_config(), prefix, self)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return AttambaBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        return self.spec

    @property
    def pages(self) -> torch.Tensor:
        """(pages, rows, row values): the rows of the cache's own, and what else of a page makes a whole row."""
        cache = self.kv_cache
        width = cache.shape[-1]
        rows = self.spec.page_size_bytes // (width * cache.element_size())
        return cache.as_strided((cache.shape[0], rows, width), (cache.stride(0), width, 1))

    def kv_pages(self, heads: int) -> KvPages:
        """The pages of a cache of K|V, as views that are made once for what vLLM has bound."""
        if self._kv is None or self._kv[0] is not self.kv_cache:
            self._kv = self.kv_cache, KvPages(self.pages, heads)
        return self._kv[1]
