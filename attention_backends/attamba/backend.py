"""What vLLM asks of a layer's attention backend, for caches that the model itself reads and writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)

from attention_backends.attamba.chunks import PAGE_ROWS, ChunkPlan, Rows, plan_step, step_rows

if TYPE_CHECKING:
    from attention_backends.attamba.cache import PagedRows


@dataclass
class AttambaMetadata:
    """The batch of one step, for one cache group.

    Attributes:
        rows: its tokens.
        block_table: (R, columns) int32, pages of this group.
        query_start_loc, seq_lens: (R + 1,) and (R,) int32.
    """

    rows: Rows
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    plans: dict[tuple[int, int, int], ChunkPlan] = field(default_factory=dict)
    _slots: torch.Tensor | None = None

    def plan(self, chunk: int, offset: int, window: int) -> ChunkPlan:
        """The plan of a layer; layers of equal offset share it."""
        key = (chunk, offset, window)
        if key not in self.plans:
            self.plans[key] = plan_step(self.rows, *key)
        return self.plans[key]

    def slots_of(self, cache: PagedRows, request: np.ndarray, position: np.ndarray) -> torch.Tensor:
        """Row in all of a cache's pages for tokens of requests; both are broadcast, the result has their shape."""
        page = cache.spec.block_size
        row, at = (torch.from_numpy(array).to(self.block_table.device) for array in (request, position))
        return self.block_table[row, at // page] * cache.pages.shape[1] + at % page

    def slots(self, cache: PagedRows) -> torch.Tensor:
        """The same for the tokens of the step, (T,)."""
        if self._slots is None:
            self._slots = self.slots_of(cache, self.rows.request, self.rows.position)
        return self._slots

    def state_slots(self, cache: PagedRows, plan: ChunkPlan) -> torch.Tensor:
        """Row in all of a states cache's pages for each chunk that ends in the step, (E,)."""
        page = np.maximum(plan.end_state, 0) // PAGE_ROWS
        place = np.where(plan.end_state < 0, PAGE_ROWS, plan.end_state % PAGE_ROWS)
        request, column, row = (
            torch.from_numpy(array).to(self.block_table.device) for array in (self.rows.request[plan.ends], page, place)
        )
        return self.block_table[request, column] * cache.pages.shape[1] + row


class AttambaMetadataBuilder(AttentionMetadataBuilder[AttambaMetadata]):
    """Plans are made on the host, where lengths are known without waiting for the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # abstract in vLLM

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AttambaMetadata:
        common = common_attn_metadata
        if common.seq_lens_cpu_upper_bound is None:
            raise RuntimeError("the model runner gave no host copy of seq_lens: chunks can't be planned")
        query_lens = common.query_start_loc_cpu.diff().numpy().astype(np.int64)
        seq_lens = common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
        return AttambaMetadata(
            step_rows(query_lens, seq_lens), common.block_table_tensor, common.query_start_loc, common.seq_lens
        )


class AttambaBackend(AttentionBackend):
    """A backend in name: the model's layers read and write their caches themselves."""

    @staticmethod
    def get_name() -> str:
        return "ATTAMBA"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("Attamba's layers attend by themselves")

    @staticmethod
    def get_builder_cls() -> type[AttambaMetadataBuilder]:
        return AttambaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]
