"""Wraps a vLLM attention backend so that star requests are handed to its kernel in virtual rows.

Only the metadata builder changes; cache layout and name stay those of the base backend. So does the kernel, except on
CPU, where cpu_impl.py has one that is faster for many batches. On GPUs vLLM picks FLASH_ATTN, TRITON_ATTN or FLASHINFER
itself, on CPU always CPU_ATTN: each is overridden in place.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

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

from attention_backends.star.metadata import virtual_block_table, virtual_metadata
from attention_backends.star.step import current_step
from vllm_compat.patching import extends

WRAPPED = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")


def takes_star(spec: Any) -> bool:
    """Whether the layers of a KV cache spec are full causal attention, the only kind star rows are right for."""
    return (
        isinstance(spec, FullAttentionSpec)
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
        and not spec.non_causal
    )


def _config_for_virtual_rows(vllm_config: Any, page_size: int) -> Any:
    """The configuration with ``max_num_seqs`` raised to the virtual rows a step can have.

    Builders size buffers by ``max_num_seqs``. A request adds at most a row at each end of its span, and one for each
    block.
    """
    config = copy.copy(vllm_config)
    config.scheduler_config = copy.copy(vllm_config.scheduler_config)
    scheduler = config.scheduler_config
    scheduler.max_num_seqs = 3 * scheduler.max_num_seqs + scheduler.max_num_batched_tokens // page_size
    return config


@functools.cache
def make_star_backend(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """A subclass of ``base`` whose builder splits star rows; layers without full attention keep their rows."""
    base_builder: Any = base.get_builder_cls()

    @extends(AttentionMetadataBuilder)
    class StarBuilder(base_builder):
        def __init__(
            self,
            kv_cache_spec: Any,
            layer_names: list[str],
            vllm_config: Any,
            device: torch.device,
            **kw: Any,
        ):
            self.takes_star = takes_star(kv_cache_spec)
            if self.takes_star and device.type != "cpu":
                vllm_config = _config_for_virtual_rows(vllm_config, kv_cache_spec.block_size)
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kw)

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            """Full graphs stay usable for decode batches, which are never rewritten, but not for mixed batches."""
            support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            decode_only = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            return min(support, decode_only, key=lambda level: level.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            step = current_step() if self.takes_star else None
            rows = step.rows(common_attn_metadata, self.kv_cache_spec.block_size) if step else None
            if step is not None and rows is not None:
                step.count(rows)
                common_attn_metadata = virtual_metadata(common_attn_metadata, rows)
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

        def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
            step = current_step() if self.takes_star else None
            rows = step.built_rows(self.kv_cache_spec.block_size) if step else None
            if rows is not None:
                blk_table = virtual_block_table(blk_table, rows)
            return super().update_block_table(metadata, blk_table, slot_mapping)

    @extends(AttentionBackend)
    class StarBackend(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def get_builder_cls() -> Any:
            return StarBuilder

        @staticmethod
        def get_impl_cls() -> Any:
            if base.get_name() != "CPU_ATTN":
                return base.get_impl_cls()
            from attention_backends.star.cpu_impl import CpuImpl

            return CpuImpl

    StarBuilder.__name__ = StarBuilder.__qualname__ = f"Star{base_builder.__name__}"
    StarBackend.__name__ = StarBackend.__qualname__ = f"Star{base.__name__}"
    return StarBackend


def __getattr__(name: str) -> type[AttentionBackend]:
    """``attention_backends.star.backend.CPU_ATTN`` is the star form of vLLM's backend of that name."""
    if name not in WRAPPED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return make_star_backend(resolve_obj_by_qualname(AttentionBackendEnum[name].value))


def register_star_backends() -> None:
    """Let vLLM resolve the wrapped names to their star forms, in this process."""
    for name in WRAPPED:
        register_backend(AttentionBackendEnum[name], f"{__name__}.{name}")
