"""The transformer that Attamba is held against: a Llama in training form, exported as one that vLLM serves.

Same norms, rotary embedding, feed-forward and depth as `attamba_model`. Its KV cache can be cut to 1 / cut of the full
width ("isoKV"): one KV head serves several query heads and, where that is still too wide, the heads are narrower. The
queries stay as wide as the model (the paper's isoKV models narrow them too).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.random_llama import byte_tokenizer
from examples.attamba_model import FeedForward, initialise, rotate


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes, under the names of Llama's `config.json`. `num_attention_heads * head_dim` is `hidden_size`."""

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
    """(query heads, KV heads, head size) for a K and V of 1 / cut of the width, queries unchanged."""
    if heads % cut == 0:
        return heads, heads // cut, head_dim
    narrower = cut // heads
    if cut % heads or head_dim % (2 * narrower):
        raise ValueError(f"{heads} heads of {head_dim} cannot be cut to 1/{cut}: use a power of two")
    return heads * narrower, 1, head_dim // narrower


class TransformerLayer(nn.Module):
    """One layer, (B, T, hidden_size) -> the same."""

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

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attend(self.attention_norm(h))
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The language model."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        initialise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits: (B, T) int64 -> (B, T, vocab_size)."""
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.output(self.norm(h))


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
    """Its weights under Llama's names, and in Llama's order.

    Llama rotates the two halves of a head, this model neighbouring pairs: rows of a head that are `[size / 2, 2]`
    here are `[2, size / 2]` there.
    """
    size = model.config.head_dim
    weights = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output.weight,
    }
    for index, layer in enumerate(model.layers):
        for ours, theirs in LLAMA_NAMES.items():
            weight = layer.get_submodule(ours).weight
            if ours in ("wq", "wk"):
                weight = weight.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)
            weights[f"model.layers.{index}.{theirs}.weight"] = weight
    return {name: weight.detach().clone() for name, weight in weights.items()}


def write_llama(path: Path, model: Transformer, dtype: torch.dtype) -> None:
    """A checkpoint of the architecture LlamaForCausalLM, with the byte tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, tokenizer = model.config, byte_tokenizer()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    llama.load_state_dict(llama_weights(model))  # strict: a missing, extra or misshapen tensor is an error
    llama.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
