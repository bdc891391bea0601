"""The transformer that Attamba is compared with: a Llama for training, exported as a Llama that vLLM serves.

Norms, rotary embedding, feed-forward and depth are those of `attamba_model`. The KV cache can be cut to 1 / cut of the
full width ("isoKV"): several query heads use one KV head and, if that is not enough, heads are narrower. The queries
stay as wide as the model (the paper's isoKV models have narrower queries too).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from examples.attamba_model import FeedForward, LanguageModel, Layer, rotate


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes, with the names of Llama's `config.json`. `num_attention_heads * head_dim` is `hidden_size`."""

    vocab_size: int = 257
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 384
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096


def cut_heads(heads: int, head_dim: int, cut: int) -> tuple[int, int, int]:
    """Return (query heads, KV heads, head size) for K and V of 1 / cut of the width.

    The width of the queries is unchanged.

    Raises:
        ValueError: the heads can't be cut that way.
    """
    if heads % cut == 0:
        return heads, heads // cut, head_dim
    narrower = cut // heads
    if cut % heads or head_dim % (2 * narrower):
        raise ValueError(f"{heads} heads of {head_dim} can't be cut to 1/{cut}: use a power of two")
    return heads * narrower, 1, head_dim // narrower


class TransformerLayer(Layer):
    """A layer of the transformer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.wq = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size)

    def attend(self, x: Tensor) -> Tensor:
        config = self.config
        parts = (self.wq(x), self.wk(x), self.wv(x))
        q, k, v = (part.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for part in parts)
        q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
        k, v = (part.expand(-1, q.shape[1], -1, -1) if part.shape[1] == 1 else part for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        return self.wo(out.transpose(1, 2).flatten(-2))


class Transformer(LanguageModel):
    """The language model."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, lambda layer: TransformerLayer(config))


LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def llama_weights(model: Transformer) -> dict[str, Tensor]:
    """Return the model's weights under Llama's names and in Llama's row order.

    Llama rotates the two halves of a head, this model rotates neighbouring pairs: the rows of a Q or K head have the
    order `[size / 2, 2]` in this model and `[2, size / 2]` in Llama.
    """
    size = model.config.head_dim
    weights = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output.weight,
    }
    for index, layer in enumerate(model.layers):
        for name, llama_name in LLAMA_NAMES.items():
            weight = layer.get_submodule(name).weight
            if name in ("wq", "wk"):
                weight = weight.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)
            weights[f"model.layers.{index}.{llama_name}.weight"] = weight
    return {name: weight.detach().clone() for name, weight in weights.items()}


def write_llama(path: Path, model: Transformer, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a checkpoint of the architecture LlamaForCausalLM, with the tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = asdict(model.config)
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    fields |= {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    llama = LlamaForCausalLM(LlamaConfig(**fields))
    llama.load_state_dict(llama_weights(model))  # raises RuntimeError for missing, unknown or misshapen tensors
    llama.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
