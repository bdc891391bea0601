"""The Llama of vLLM with K and V shifted before RoPE: its attention, and the code that both model families share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.utils import set_weight_attrs

from starling.attention_backends.kv_shift.state import ShiftState
from starling.engine_ext.models.checkpoint import Shapes, checked_weights

Weights = Iterable[tuple[str, torch.Tensor]]


def kv_heads_of_rank(total: int, rank: int, size: int) -> slice:
    """Return the KV heads that a tensor-parallel rank holds, as QKVParallelLinear divides them.

    With more ranks than heads, neighbouring ranks hold the same head.

    Args:
        total: KV heads of the model.
        rank: tensor-parallel rank of this process.
        size: number of tensor-parallel ranks.
    """
    if total >= size:
        return slice(rank * (total // size), (rank + 1) * (total // size))
    head = rank // (size // total)
    return slice(head, head + 1)


class KVShiftForCausalLM(LlamaForCausalLM):
    """A Llama with KV shifting attention. A subclass sets its attention class and the tensors of its checkpoints."""

    attention: type[LlamaAttention]
    expected_tensors: Callable[[Any], Shapes]
    loaded = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        layer_type: Any = functools.partial(LlamaDecoderLayer, attn_layer_type=self.attention)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights: Weights) -> set[str]:
        """Load the checkpoint or an update of some tensors, and return the names of the loaded parameters.

        Raises:
            ValueError: a tensor is missing or has the wrong shape, see ``checked_weights``.
        """
        quantized, expected = self.model.quant_config is not None, self.expected_tensors(self.config)
        checked = checked_weights(weights, expected, quantized=quantized, update=self.loaded)
        names = super().load_weights(self.mapped_weights(checked))
        self.loaded = True
        return names

    @staticmethod
    def mapped_weights(weights: Weights) -> Weights:
        """Return the weights of the checkpoint as vLLM's Llama loads them."""
        return weights


class KVShiftAttention(LlamaAttention):
    """LlamaAttention with the parameters ``conv_k`` and ``conv_v``.

    Both are (KV heads of this rank, 2) in float32, columns [previous, current].

    Raises:
        ValueError: a feature that ``starling.attention_backends.kv_shift.state.refuse_unsupported`` names is on.
    """

    def __init__(self, config: Any, *, prefix: str = "", **kwargs: Any):
        super().__init__(config, prefix=prefix, **kwargs)
        self.conv_k = self._weights()
        self.conv_v = self._weights()
        self.shift = ShiftState(self.attn, f"{prefix}.shift")

    def _weights(self) -> nn.Parameter:
        weights = nn.Parameter(torch.empty(self.num_kv_heads, 2, dtype=torch.float32), requires_grad=False)
        set_weight_attrs(weights, {"weight_loader": self._load_weights})
        return weights

    def _load_weights(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        # vLLM names the first argument when it loads weights again.
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        heads = kv_heads_of_rank(self.total_num_kv_heads, rank, size)
        param.data.copy_(loaded.reshape(self.total_num_kv_heads, 2)[heads])

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the output (T, hidden size) for the normed inputs (T, hidden size)."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        key, value = self.shift(key, value, self.conv_k, self.conv_v)
        query, key = self.rotary_emb(positions, query, key)
        output, _ = self.o_proj(self.attn(query, key, value))
        return output
