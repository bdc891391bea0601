"""Wraps a vLLM attention backend so that star requests are handed to its kernel in virtual rows.

Only the metadata builder changes; cache layout and name stay those of the base backend. So does the kernel, except on
CPU, where cpu_impl.py has one that is faster for many batches. A GPU server that is started for dense heads, or for
documents, has an implementation around vLLM's, which attends by the parts of the step (gpu_impl.py). On GPUs vLLM picks
FLASH_ATTN, TRITON_ATTN or FLASHINFER itself, on CPU always CPU_ATTN: each is overridden in place.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from starling.attention_backends.kernels import contract
from starling.attention_backends.kernels.contract import AMX, CPU_ISAS, Sizes
from starling.attention_backends.kernels.triton.ranges import prefill_tile_queries
from starling.attention_backends.paged import CLASSES, NAME
from starling.attention_backends.star.gpu_impl import (
    keep_for_capture,
    make_gpu_impl,
    rerotates_queries,
    warm_up,
)
from starling.attention_backends.star.head_step import HeadBuilders
from starling.attention_backends.star.metadata import virtual_block_table, virtual_metadata
from starling.attention_backends.star.range_attention import GraphRanges
from starling.attention_backends.star.step import current_step
from starling.config.entry import config_of
from starling.vllm_compat.config import set_cpu_attention_isa
from starling.vllm_compat.head_attention import build_unsplit
from starling.vllm_compat.patching import extends

WRAPPED = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
"""vLLM's backends that have a star form. Starling's own have one too (paged/)."""

BY_PARTS = "ByParts"
"""Behind the name of a backend whose layers attend by the parts of the step on a GPU."""


def takes_star(spec: Any) -> bool:
    """Return whether the layers of a KV cache spec are full causal attention, the only kind that star rows support."""
    return (
        isinstance(spec, FullAttentionSpec)
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
        and not spec.non_causal
    )


def graph_support(own_positions: bool) -> AttentionCGSupport:
    """Return the batches that full CUDA graphs may replay at most: decode batches that are never rewritten.

    Args:
        own_positions: whether the engine is made for documents. Its graphs have the kernels of range_attention.py, for
            rows of one token.
    """
    return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if own_positions else AttentionCGSupport.UNIFORM_BATCH


def virtual_bounds(scheduler_config: Any, max_model_len: int, page_size: int) -> tuple[int, int]:
    """(rows, pages in all their block tables) that a step can have at most, after its rows are split.

    With S requests, T tokens and pages of P tokens: ``StarPlan.split`` cuts the span of a request into whole star
    blocks, and at most three other pieces: what is left of the first and of the last block, and the query. A block has
    B >= P tokens, so at most T / P of the pieces are whole blocks.

    - Rows: 3 S + T / P.
    - Pages: a whole block sees at most 3 B keys: the anchor, the overlap and itself. So all whole blocks have at most
      3 T / P pages. Each other piece has at most M pages, those of max_model_len tokens: 3 S M + 3 T / P.

    The factor 3 can't be lowered: with an overlap of B, the end of block 1, a last block of one token and a query of
    one token are three rows of nearly M pages each.
    """
    requests, whole_blocks = scheduler_config.max_num_seqs, scheduler_config.max_num_batched_tokens // page_size
    return 3 * requests + whole_blocks, 3 * requests * -(-max_model_len // page_size) + 3 * whole_blocks


def _config_for_virtual_rows(vllm_config: Any, page_size: int, sizes_by_pages: bool) -> Any:
    """Return the configuration from which a builder makes its buffers large enough for virtual rows.

    Builders size buffers by ``max_num_seqs``. FlashInfer's also has one of ``max_num_seqs`` times the pages of
    ``max_model_len``, which it reads for nothing else. Virtual rows do not all have that many pages. Therefore
    ``max_model_len`` is lowered so that there is room for their pages together. With S = 64, T = 8,192, P = 16 and
    1M tokens that buffer takes 50 MB instead of 185 MB, and with S = 1,024 0.81 GB instead of 0.94 GB. Without star it
    takes 17 MB and 0.27 GB.

    Args:
        sizes_by_pages: whether the builder has a buffer of that kind.
    """
    config = copy.copy(vllm_config)
    rows, pages = virtual_bounds(vllm_config.scheduler_config, vllm_config.model_config.max_model_len, page_size)
    config.scheduler_config = copy.copy(vllm_config.scheduler_config)
    config.scheduler_config.max_num_seqs = rows
    if sizes_by_pages:
        config.model_config = copy.copy(vllm_config.model_config)
        config.model_config.max_model_len = -(-pages // rows) * page_size
    return config


def tile_queries_of(vllm_config: Any, spec: Any) -> int:
    """Tokens of a tile of queries of the kernel for rows of many tokens behind documents."""
    model = vllm_config.model_config
    heads = model.get_num_attention_heads(vllm_config.parallel_config)
    sizes = Sizes(1, 1, heads, spec.num_kv_heads, spec.head_size, spec.head_size, spec.block_size)
    return prefill_tile_queries(sizes, model.dtype.itemsize)


@extends(AttentionMetadataBuilder)
class StarBuilder:
    """Mixed into a backend's builder, before it: splits star rows. Layers without full attention keep their rows."""

    # Of the class that it is mixed into: vLLM's name of the backend, its builder, and whether layers attend by parts.
    backend: str
    base: Any
    by_parts: bool
    # vLLM's own.
    kv_cache_spec: Any
    layer_names: list[str]
    vllm_config: Any
    device: torch.device

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, **kw: Any):
        self.takes_star = takes_star(kv_cache_spec)
        self.max_requests = vllm_config.scheduler_config.max_num_seqs
        if self.takes_star and device.type != "cpu":
            sizes_by_pages = self.backend == "FLASHINFER"
            vllm_config = _config_for_virtual_rows(vllm_config, kv_cache_spec.block_size, sizes_by_pages)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kw)  # type: ignore[call-arg]
        self.graph_ranges: GraphRanges | None = None
        self.head_builders: HeadBuilders | None = None
        if self.takes_star and (device.type == "cpu" or self.by_parts):
            self.head_builders = HeadBuilders(self.backend, self.base, self)
            # There is more metadata than vLLM would update, and a captured layer has the table of its own group.
            self.supports_update_block_table = False
        if self.takes_star and device.type == "cpu":
            self._lay_out_for_vectors(layer_names)

    @functools.cached_property
    def tile_queries(self) -> int:
        """Tokens of a tile of queries of the kernel for rows of many tokens behind documents, on a GPU."""
        return tile_queries_of(self.vllm_config, self.kv_cache_spec) if contract.uses_triton(self.device) else 1

    def _lay_out_for_vectors(self, layer_names: list[str]) -> None:
        """Let vLLM lay out keys for vectors, where it would for AMX tiles and Starling's op has to read them."""
        config, builder = config_of(self.vllm_config), cast("Any", self)
        if config is not None and config.reads_all_caches and builder.isa == AMX:
            set_cpu_attention_isa(builder, layer_names, CPU_ISAS[0])

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Return the base backend's support, within ``graph_support``."""
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        rerotates = cls.by_parts and any(map(rerotates_queries, layers_of(vllm_config).values()))
        return min(support, graph_support(rerotates), key=lambda level: level.value)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        step = current_step() if self.takes_star else None
        page_size = self.kv_cache_spec.block_size
        rows = step.rows(common_attn_metadata, page_size) if step else None
        graph = self.graph_ranges
        table = graph.fill(common_attn_metadata, rows, page_size) if graph is not None else None
        if step is not None and rows is not None:
            step.count(rows)
            documents, heads = step.documents, step.heads
            is_whole = documents is not None and documents.keep_ranges(
                rows, common_attn_metadata, page_size, table, self.tile_queries
            )
            if not is_whole or heads is not None:
                virtual = virtual_metadata(common_attn_metadata, rows)
                if documents is not None:
                    documents.keep_block_tables(rows, common_attn_metadata, virtual, page_size)
                if heads is not None:
                    build = self.head_builders.build if self.head_builders else None
                    heads.keep(common_attn_metadata, virtual, page_size, self.layer_names, build)
                of_rows = functools.partial(super().build, common_prefix_len, virtual, fast_build)  # type: ignore[misc]
                return build_unsplit(self.backend, self, virtual.num_actual_tokens, of_rows)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """As the base backend's. A full graph of an engine for documents reads the table that ``build`` fills."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        layers = layers_of(self.vllm_config) if self.takes_star and self.by_parts else {}
        rerotating = [layers[name] for name in self.layer_names if name in layers and rerotates_queries(layers[name])]
        if rerotating and common_attn_metadata.max_query_len == 1:
            if self.graph_ranges is None:
                self.graph_ranges = GraphRanges(self.max_requests, common_attn_metadata.seq_lens.device)

                # A GPU can't load a kernel in a capture. vLLM captures graphs before ``compile_or_warm_up_model`` too,
                # to learn what they take.
                warm_up(rerotating)
            self.graph_ranges.clear()
            keep_for_capture(metadata, self.graph_ranges.table(common_attn_metadata))
        return metadata

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        step = current_step() if self.takes_star else None
        rows = step.built_rows(self.kv_cache_spec.block_size) if step else None
        if rows is not None:
            blk_table = virtual_block_table(blk_table, rows)
        return super().update_block_table(metadata, blk_table, slot_mapping)  # type: ignore[misc]


def layers_of(vllm_config: Any) -> dict[str, Any]:
    """Return the engine's layers by name, its attention layers among them."""
    layers: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    return layers


def _make_builder(backend: type[AttentionBackend], by_parts: bool) -> Any:
    """Make a subclass of a backend's builder that splits star rows."""
    base: Any = backend.get_builder_cls()
    fields = {"backend": backend.get_name(), "base": base, "by_parts": by_parts}
    return type(_class_name(base.__name__, by_parts), (StarBuilder, base), fields)


@functools.cache
def make_star_backend(base: type[AttentionBackend], by_parts: bool = False) -> type[AttentionBackend]:
    """Make a subclass of ``base`` whose layers run star rows.

    Args:
        by_parts: whether layers on a GPU attend with the step's kernels for documents or dense heads.
    """
    builder = _make_builder(base, by_parts)

    @extends(AttentionBackend)
    class StarBackend(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def get_builder_cls() -> Any:
            return builder

        @staticmethod
        def get_impl_cls() -> Any:
            if base.get_name() != "CPU_ATTN":
                impl = base.get_impl_cls()
                return make_gpu_impl(impl, base.get_name()) if by_parts else impl
            from starling.attention_backends.star.cpu_impl import CpuImpl

            return CpuImpl

    StarBackend.__name__ = StarBackend.__qualname__ = _class_name(base.__name__, by_parts)
    return StarBackend


def _class_name(base_name: str, by_parts: bool = False) -> str:
    """Return the name of the star form of a class of vLLM's; a backend is found in this module under it."""
    return f"Star{base_name}{BY_PARTS if by_parts else ''}"


VLLM_PATHS = {name: AttentionBackendEnum[name].value for name in WRAPPED}
PATHS = {_class_name(path.rpartition(".")[2]): path for path in (*VLLM_PATHS.values(), *CLASSES.values())} | VLLM_PATHS
"""The base of each star backend, by vLLM's name of the backend and by the name of its class. Imports no backend."""


def __getattr__(name: str) -> type[AttentionBackend]:
    """``starling.attention_backends.star.backend.CPU_ATTN`` is the star form of vLLM's backend of that name.

    The same class also has its own name, ``StarCPUAttentionBackend``: CUDA's platform finds a backend by the qualified
    name of its class, other platforms by the registered name. With BY_PARTS behind it, layers attend by parts.
    """
    base = name.removesuffix(BY_PARTS)
    if base not in PATHS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return make_star_backend(resolve_obj_by_qualname(PATHS[base]), base != name)


def register_star_backends(gpu_attention: str | None = None, by_parts: bool = False) -> None:
    """Let vLLM resolve the wrapped names to their star forms, in this process.

    Args:
        gpu_attention: the setting whose backend of Starling's is one of them.
        by_parts: whether layers on a GPU attend by what a step has for documents or dense heads.
    """
    kind = BY_PARTS if by_parts else ""
    for name in WRAPPED:
        register_backend(AttentionBackendEnum[name], f"{__name__}.{name}{kind}")
    if gpu_attention in CLASSES:
        own = _class_name(CLASSES[gpu_attention].rpartition(".")[2])
        register_backend(AttentionBackendEnum[NAME], f"{__name__}.{own}{kind}")
