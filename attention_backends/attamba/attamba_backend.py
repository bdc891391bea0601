"""The attention backend that vLLM needs for each cache of an Attamba layer. The model reads and writes the caches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from starling.attention_backends.attamba.chunks import (
    ChunkPlan,
    StepTokens,
    dense_tokens,
    layer_offset,
    num_keys_seen,
    plan_step,
    star_tokens,
)
from starling.attention_backends.kernels.cpu.paged_op import built_op
from starling.attention_backends.star.metadata import virtual_metadata
from starling.attention_backends.star.rows import VirtualRows
from starling.attention_backends.star.step import current_step


@dataclass
class AttambaMetadata:
    """The batch of one step, for one cache group.

    Attributes:
        num_tokens: T, tokens of the step, with those that pad a full CUDA graph.
        tokens: the tokens, in the group of states, from which layers are planned; None in the others, and in a step
            that ``decodes``.
        block_table: (R, columns) int32, page ids of this group, to write to.
        key_table: (pieces, columns) int32, page ids that each piece of the batch attends to.
        query_start_loc, seq_lens: (pieces + 1,) and (pieces,) int32, of ``key_table``.
        slot_mapping: (T,) int64, negative where a token belongs to no request.
        decodes: whether each request has one token, so that decode.py can compute the layers. The group of states says
            whether it does: star rows change that group, and not the rows of open chunks.
    """

    num_tokens: int
    tokens: StepTokens | None
    block_table: torch.Tensor
    key_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    decodes: bool = False
    _plans: dict[tuple[int, int, int], ChunkPlan] = field(default_factory=dict)

    @classmethod
    def on_one_page(cls, tokens: StepTokens, spec: AttentionSpec, device: torch.device) -> AttambaMetadata:
        """Metadata of a step whose requests all have page 0 only, for runs without a cache.

        Args:
            tokens: of a dense step.
            spec: of the group's cache.
        """
        query_lens = np.bincount(tokens.request)
        starts = np.append(0, query_lens.cumsum())
        seq_lens = tokens.position[starts[1:] - 1] + 1
        columns = -(-int(seq_lens.max()) // spec.block_size)
        table = torch.zeros(len(query_lens), columns, dtype=torch.int32, device=device)
        query_start_loc, lens = (torch.from_numpy(array).int().to(device) for array in (starts, seq_lens))
        slots = torch.zeros(len(tokens.request), dtype=torch.int64, device=device)
        return cls(len(tokens.request), tokens, table, table, query_start_loc, lens, slots)

    @cached_property
    def token_places(self) -> tuple[torch.Tensor, ...]:
        """request, position and piece of ``tokens``, on the device of the tables; copied once for all layers."""
        assert self.tokens is not None
        return tuple(async_tensor_h2d(tensor, self.block_table.device) for tensor in self.tokens.tensors[:3])

    def plan(self, chunk_size: int, offset: int, window: int) -> ChunkPlan:
        """Return the plan of a layer, made once for all layers with the same offset; needs ``tokens``."""
        assert self.tokens is not None
        key = (chunk_size, offset, window)
        if key not in self._plans:
            self._plans[key] = make_plan(self.tokens, *key)
        return self._plans[key]


def make_plan(tokens: StepTokens, chunk_size: int, offset: int, window: int) -> ChunkPlan:
    """``plan_step``, by the C++ op where it is there for the model's device: a step has up to P plans."""
    ops = built_op() if current_platform.is_cpu() else None
    if ops is None:
        return plan_step(tokens, chunk_size, offset, window)
    return ChunkPlan(*ops.attamba_plan(*tokens.tensors, chunk_size, offset, window))


def step_tokens(common: CommonAttentionMetadata) -> StepTokens:
    """Return the tokens of a step under dense attention.

    Raises:
        RuntimeError: the model runner gives no host copy of the sequence lengths.
    """
    if common.seq_lens_cpu_upper_bound is None:
        raise RuntimeError("the model runner gave no host copy of seq_lens, so chunks can't be planned")
    query_lens = common.query_start_loc_cpu.diff().numpy().astype(np.int64)
    return dense_tokens(query_lens, common.seq_lens_cpu_upper_bound.numpy().astype(np.int64))


class AttambaMetadataBuilder(AttentionMetadataBuilder[AttambaMetadata]):
    """Builds the metadata on the host, which knows the lengths without waiting for the device.

    On GPUs, a step in which each request has one token needs nothing of the host's. Its metadata are the model runner's
    own persistent tensors, so a full CUDA graph can record it.

    Attributes:
        holds_keys: whether queries attend to this group's cache: true for the states and the window.
        takes_star: whether the group follows the star plans of a step. The rows of open chunks do not: they hold no
            keys, and Star Attention does not change the chunks.
        holds_states: whether it is the group of states, from which layers are planned.
        has_kernels: whether decode.py can run on the device: on all but CPUs.
    """

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # abstract in vLLM
        self.holds_states = isinstance(kv_cache_spec, FullAttentionSpec)
        self.holds_keys = self.takes_star = kv_cache_spec.head_size_v > 0
        self.has_kernels = device.type != "cpu"

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AttambaMetadata:
        """Build the metadata of the group.

        Raises:
            RuntimeError: the model runner gives no host copy of the sequence lengths.
        """
        common = keys = common_attn_metadata
        step = current_step() if self.takes_star else None
        virtual = step.rows(common, self.kv_cache_spec.block_size, anchored=self.holds_states) if step else None
        decodes = self.has_kernels and virtual is None and common.max_query_len == 1
        tokens = step_tokens(common) if self.holds_states and not decodes else None
        if step is not None and virtual is not None:
            keys = virtual_metadata(common, virtual)
            if tokens is not None:
                tokens = star_tokens(tokens, virtual)
                step.count(self.recount_pairs(virtual, tokens))
        tables = common.block_table_tensor, keys.block_table_tensor
        lens = keys.query_start_loc, keys.seq_lens
        return AttambaMetadata(common.num_actual_tokens, tokens, *tables, *lens, common.slot_mapping, decodes)

    def recount_pairs(self, virtual: VirtualRows, tokens: StepTokens) -> VirtualRows:
        """Replace the query-key pairs of the states' rows by Attamba's, averaged over the model's layers."""
        config = self.vllm_config.model_config.hf_config
        chunk_size, window, layers = config.token_chunk, config.leading_tokens, config.num_hidden_layers
        offsets = Counter(layer_offset(layer, layers, chunk_size) for layer in range(layers))
        in_context = np.repeat(virtual.star, virtual.query_lens)

        def pairs(of: StepTokens) -> float:
            keys = {offset: num_keys_seen(of, chunk_size, offset, window)[in_context].sum() for offset in offsets}
            return sum(count * keys[offset] for offset, count in offsets.items()) / layers

        return replace(virtual, star_pairs=pairs(tokens), dense_pairs=pairs(tokens.dense()))


class AttambaBackend(AttentionBackend):
    """Provides the metadata only: the layers of the model attend by themselves."""

    @staticmethod
    def get_name() -> str:
        return "ATTAMBA"

    @staticmethod
    def get_impl_cls() -> Any:
        """Raise NotImplementedError: no attention implementation exists."""
        raise NotImplementedError("Attamba has no attention implementation: the model's layers attend by themselves")

    @staticmethod
    def get_builder_cls() -> type[AttambaMetadataBuilder]:
        return AttambaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]
