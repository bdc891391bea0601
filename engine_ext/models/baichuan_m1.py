"""Baichuan-M1 (`model_type` baichuan_m1): KV shifting attention, with sliding windows in some layers.

Tensor names are Llama's, except for ``W_pack``, which is q, k and v in one tensor. The rows of ``lm_head`` are
L2-normalised at load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from starling.engine_ext.models.checkpoint import Shapes, mlp_and_norm_shapes, outer_shapes, shift_shapes
from starling.engine_ext.models.configs import BaichuanM1Config
from starling.engine_ext.models.shifted_attention import KVShiftAttention, KVShiftForCausalLM

HEAD_EPS = 1e-7
"""Constant that is added to the norm of a row, as in the model's published code."""


def expected_tensors(config: BaichuanM1Config) -> Shapes:
    """Return the shapes of all tensors of the checkpoint, by name."""
    shapes = outer_shapes(config)
    for index in range(config.num_hidden_layers):
        own = config.layer_config(index)
        query, key = own.num_attention_heads * own.head_dim, own.num_key_value_heads * own.head_dim
        layer = shift_shapes(own.num_key_value_heads) | mlp_and_norm_shapes(config)
        layer["self_attn.W_pack.weight"] = (query + 2 * key, config.hidden_size)
        layer["self_attn.o_proj.weight"] = (config.hidden_size, query)
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def mapped_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights under vLLM's names, with the rows of ``lm_head`` normalised unless it is quantised."""
    for name, tensor in weights:
        if name == "lm_head.weight" and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            rows = tensor.float()
            tensor = (rows / (rows.norm(dim=-1, keepdim=True) + HEAD_EPS)).to(tensor.dtype)
        yield name.replace(".W_pack.", ".qkv_proj."), tensor


class BaichuanM1Attention(KVShiftAttention):
    """Attention with the layer's own numbers of heads. LlamaAttention reads the window from ``layer_types``."""

    def __init__(self, config: Any, *, prefix: str = "", **kwargs: Any):
        own = config.layer_config(extract_layer_index(prefix))
        kwargs |= {"num_heads": own.num_attention_heads, "num_kv_heads": own.num_key_value_heads}
        super().__init__(own, prefix=prefix, **kwargs)


class BaichuanM1ForCausalLM(KVShiftForCausalLM):
    # vLLM maps the module names in quantisation configs with it.
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr={".W_pack": ".qkv_proj"}) | LlamaModel.hf_to_vllm_mapper
    packed_modules_mapping = {  # noqa: RUF012, vLLM's class declares an instance variable and shares the dict as well
        "qkv_proj": ["qkv_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    attention = BaichuanM1Attention
    expected_tensors = staticmethod(expected_tensors)
    mapped_weights = staticmethod(mapped_weights)
