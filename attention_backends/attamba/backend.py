"""What vLLM asks of a layer's attention backend, for caches that the model itself reads and writes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
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
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from attention_backends.attamba.chunks import (
    PAGE_ROWS,
    ChunkPlan,
    Rows,
    keys_seen,
    layer_offset,
    plan_step,
    star_rows,
    step_rows,
)
from attention_backends.star.metadata import virtual_metadata
from attention_backends.star.rows import VirtualRows
from attention_backends.star.step import current_step

if TYPE_CHECKING:
    from attention_backends.attamba.pages import KvPages

Places = tuple[torch.Tensor, torch.Tensor]


@dataclass
class AttambaMetadata:
    """The batch of one step, for one cache group.

    Attributes:
        rows: its tokens; cut into pieces by star in the group of states alone, which plans are made from.
        block_table: (R, columns) int32, pages of this group, to write to.
        key_table: (pieces, columns) int32, pages that each piece of the batch attends to.
        query_start_loc, seq_lens: (pieces + 1,) and (pieces,) int32, of the key table.
    """

    rows: Rows
    block_table: torch.Tensor
    key_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    plans: dict[tuple[int, int, int], ChunkPlan] = field(default_factory=dict)
    _places: Places | None = None

    def plan(self, chunk: int, offset: int, window: int) -> ChunkPlan:
        """The plan of a layer; layers of equal offset share it."""
        key = (chunk, offset, window)
        if key not in self.plans:
            self.plans[key] = plan_step(self.rows, *key)
        return self.plans[key]

    def places_of(self, spec: AttentionSpec, request: np.ndarray, position: np.ndarray) -> Places:
        """Pages of the group, and rows in them, for tokens of requests; both are broadcast."""
        return self._places_at(request, position // spec.block_size, position % spec.block_size)

    def places(self, spec: AttentionSpec) -> Places:
        """The same for the tokens of the step, (T,)."""
        if self._places is None:
            self._places = self.places_of(spec, self.rows.request, self.rows.position)
        return self._places

    def write_states(self, states: KvPages, plan: ChunkPlan, key: torch.Tensor, value: torch.Tensor) -> None:
        """Of key and value (T, heads, head size), keep those of the chunks that end in the step."""
        chunks = plan.end_state >= 0
        ends, state = plan.ends[chunks], plan.end_state[chunks]
        if len(ends):
            tokens = torch.from_numpy(ends).to(key.device)
            places = self._places_at(self.rows.request[ends], state // PAGE_ROWS, state % PAGE_ROWS)
            states.write(*places, key[tokens], value[tokens])
        first = plan.ends[~chunks]
        if len(first):
            tokens, request = (torch.from_numpy(array).to(key.device) for array in (first, self.rows.request[first]))
            states.write_last(self.block_table[request, 0], key[tokens], value[tokens])

    def _places_at(self, request: np.ndarray, column: np.ndarray, row: np.ndarray) -> Places:
        device = self.block_table.device
        at, of, within = (torch.from_numpy(array).to(device) for array in (request, column, row))
        return self.block_table[at, of].long(), within


class AttambaMetadataBuilder(AttentionMetadataBuilder[AttambaMetadata]):
    """Plans are made on the host, where lengths are known without waiting for the device.

    Attributes:
        holds_keys: whether the group's rows are attended to, as the states and the window are.
        takes_star: whether it follows the star plans of a step: the inputs of open chunks, which hold no keys, need
            not, for chunks are cut as without star.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # abstract in vLLM
        self.holds_states = isinstance(kv_cache_spec, FullAttentionSpec)
        self.holds_keys = self.takes_star = kv_cache_spec.head_size_v > 0

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AttambaMetadata:
        common = common_attn_metadata
        if common.seq_lens_cpu_upper_bound is None:
            raise RuntimeError("the model runner gave no host copy of seq_lens: chunks can't be planned")
        query_lens = common.query_start_loc_cpu.diff().numpy().astype(np.int64)
        seq_lens = common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
        rows = step_rows(query_lens, seq_lens)
        keys = common
        step = current_step() if self.takes_star else None
        virtual = step.rows(common, self.kv_cache_spec.block_size, anchored=self.holds_states) if step else None
        if step is not None and virtual is not None:
            keys = virtual_metadata(common, virtual)
            if self.holds_states:
                rows = star_rows(rows, virtual)
                step.count(self.counted(virtual, rows))
        return AttambaMetadata(
            rows, common.block_table_tensor, keys.block_table_tensor, keys.query_start_loc, keys.seq_lens
        )

    def counted(self, virtual: VirtualRows, rows: Rows) -> VirtualRows:
        """The rows of the states with their pairs counted as they are here: a mean over the model's layers."""
        config = self.vllm_config.model_config.hf_config
        chunk, window, layers = config.token_chunk, config.leading_tokens, config.num_hidden_layers
        offsets = Counter(layer_offset(layer, layers, chunk) for layer in range(layers))
        in_context = np.repeat(virtual.star, virtual.query_lens)

        def pairs(of: Rows) -> float:
            layers_of = offsets.items()
            return sum(n * keys_seen(of, chunk, offset, window)[in_context].sum() for offset, n in layers_of) / layers

        return replace(virtual, star_pairs=pairs(rows), dense_pairs=pairs(rows.dense()))


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
