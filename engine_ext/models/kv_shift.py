"""Model families with KV shifting attention: vLLM's Llama with K and V shifted before RoPE, and Baichuan-M1."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

from starling.attention_backends.kv_shift.state import ShiftState
from starling.engine_ext.models.configs import BaichuanM1Config

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name."""


def shift_shapes(kv_heads: int) -> Shapes:
    """Return the shapes of one layer's shift weights in Baichuan-M1's layout, columns [previous, current]."""
    return {"self_attn.conv_k": (1, 1, kv_heads, 1, 2), "self_attn.conv_v": (1, 1, kv_heads, 1, 2)}


def mlp_and_norm_shapes(config: Any) -> Shapes:
    """Return the shapes of one layer's MLP and norms, with Llama's names within the layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: Shapes = {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.mlp_bias:
        shapes |= {
            "mlp.gate_proj.bias": (inner,),
            "mlp.up_proj.bias": (inner,),
            "mlp.down_proj.bias": (hidden,),
        }
    return shapes


def outer_shapes(config: Any) -> Shapes:
    """Return the shapes of the tensors outside the layers: embedding, final norm and, unless tied, the output head."""
    table = (config.vocab_size, config.hidden_size)
    shapes: Shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (config.hidden_size,)}
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": table}


def checked_weights(
    weights: Iterable[tuple[str, torch.Tensor]], expected: Shapes, *, quantized: bool, update: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights unchanged, and check them against the expected tensors.

    Args:
        weights: (name, tensor) pairs of a checkpoint.
        expected: shapes by name. Tensors of other names are not checked.
        quantized: the linear layers have tensors of other names and shapes, so only the other tensors are checked.
        update: the weights replace some tensors of a loaded model (a trainer's update), so none counts as missing.

    Raises:
        ValueError: a tensor has another shape than expected or, at the end, tensors are missing.
    """
    if quantized:
        expected = {
            name: shape for name, shape in expected.items() if name.endswith(("conv_k", "conv_v", "norm.weight"))
        }
    missing = dict(expected)
    for name, tensor in weights:
        shape = missing.pop(name, None)
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"checkpoint tensor {name} has shape {tuple(tensor.shape)}, but config.json requires {shape}"
            )
        yield name, tensor
    if missing and not update:
        names = [f"{name} {shape}" for name, shape in list(missing.items())[:4]]
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(f"the checkpoint lacks {', '.join(names)}{more}")


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


def llama_tensors(config: Any) -> Shapes:
    """Return the shapes of all tensors of the checkpoint, by name."""
    hidden, size = config.hidden_size, config.head_dim
    widths = {
        "q_proj": config.num_attention_heads * size,
        "k_proj": config.num_key_value_heads * size,
        "v_proj": config.num_key_value_heads * size,
    }
    layer = shift_shapes(config.num_key_value_heads) | mlp_and_norm_shapes(config)
    layer |= {f"self_attn.{name}.weight": (width, hidden) for name, width in widths.items()}
    layer["self_attn.o_proj.weight"] = (hidden, widths["q_proj"])
    if config.attention_bias:
        layer |= {f"self_attn.{name}.bias": (width,) for name, width in (widths | {"o_proj": hidden}).items()}
    layers = range(config.num_hidden_layers)
    inner = {f"model.layers.{index}.{name}": shape for index in layers for name, shape in layer.items()}
    return outer_shapes(config) | inner


class KVShiftLlamaForCausalLM(KVShiftForCausalLM):
    """Llama with KV shifting attention, for models trained from scratch (`model_type` kv_shift_llama).

    Configuration and tensor names are Llama's. Each layer also has ``self_attn.conv_k`` and ``self_attn.conv_v``.
    """

    attention = KVShiftAttention
    expected_tensors = staticmethod(llama_tensors)


HEAD_EPS = 1e-7
"""Constant that is added to the norm of a row, as in the model's published code."""


def baichuan_tensors(config: BaichuanM1Config) -> Shapes:
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
    """Baichuan-M1 (`model_type` baichuan_m1): KV shifting attention, with sliding windows in some layers.

    Tensor names are Llama's, except for ``W_pack``, which is q, k and v in one tensor. The rows of ``lm_head`` are
    L2-normalised at load.
    """

    # vLLM maps the module names in quantisation configs with it.
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr={".W_pack": ".qkv_proj"}) | LlamaModel.hf_to_vllm_mapper
    packed_modules_mapping = {  # noqa: RUF012, vLLM's class declares an instance variable and shares the dict as well
        "qkv_proj": ["qkv_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    attention = BaichuanM1Attention
    expected_tensors = staticmethod(baichuan_tensors)
    mapped_weights = staticmethod(mapped_weights)
