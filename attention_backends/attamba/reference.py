"""Attamba by its definition, in plain torch: a loop over tokens for the mixers, the mask written out for attention.

What the engine is held against. Shares nothing with the other files of this folder but the names of the weights
(arXiv 2411.17685, section 3; mixers: arXiv 2405.21060).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

Weights = Mapping[str, torch.Tensor]


def logits(
    weights: Weights, config: Mapping[str, Any], tokens: torch.Tensor, star: Mapping[str, int] | None = None
) -> torch.Tensor:
    """(T, vocabulary) logits of a checkpoint (its tensors by name, its config.json) for (T,) token ids.

    Args:
        star: sizes of Star Attention, see ``star_mask``; None for none.
    """
    layers, chunk, window = config["num_hidden_layers"], config["token_chunk"], config["leading_tokens"]
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    positions = torch.arange(len(tokens))
    hidden = weights["tok_embeddings.weight"][tokens]
    for layer in range(layers):
        offset = min(chunk - 1, layer * (chunk // layers))
        ends = (positions + 1 + offset) % chunk == 0
        ends[0] = True
        own = {
            name.removeprefix(f"layers.{layer}."): value
            for name, value in weights.items()
            if f"layers.{layer}." in name
        }
        x = rms_norm(hidden, own["attention_norm.weight"], eps)
        key = x + mixer(x, own, "k_ssm", ends, config)
        value = x + mixer(x, own, "v_ssm", ends, config)
        query = x @ own["attentive_ssm.wq.weight"].T
        query, key = (rotate(part.unflatten(-1, (heads, -1)), config["rope_theta"]) for part in (query, key))
        mask = star_mask(len(tokens), ends, window, **star) if star else attention_mask(len(tokens), ends, window)
        scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        weights_ = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weights_, value.unflatten(-1, (heads, -1)))
        hidden = hidden + attended.flatten(1) @ own["attentive_ssm.wo.weight"].T
        x = rms_norm(hidden, own["ffn_norm.weight"], eps)
        w1, w2, w3 = (own[f"feed_forward.w{number}.weight"] for number in (1, 2, 3))
        hidden = hidden + (functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    return rms_norm(hidden, weights["norm.weight"], eps) @ weights["output.weight"].T


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def attention_mask(tokens: int, ends: torch.Tensor, window: int) -> torch.Tensor:
    """(tokens, tokens) bool: all ends of chunks before a query, the last ``window`` tokens, and itself."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    return (key <= query) & (ends[None, :] | (key >= query - window))


def star_mask(
    tokens: int, ends: torch.Tensor, window: int, *, block_size: int, anchor_size: int, context_end: int
) -> torch.Tensor:
    """(tokens, tokens) bool under Star Attention (arXiv 2411.17116, section 2): who attends to whom.

    Chunks are cut, and their states made, as without star: a chunk belongs to the star block that its end lies in, and
    one that began in the block before carries that block's last tokens along. A query of the context sees
    - the ends of chunks that lie in the anchor, the first ``anchor_size`` tokens, or in the query's own star block:
      token 0 is such an end, and so unseen outside of block 0 where there is no anchor;
    - of the last ``window`` tokens and itself those in its own star block.
    A query at ``context_end`` or after sees what it sees without star. Sizes are tokens.
    """
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    everything = query >= context_end
    own = query // block_size == key // block_size
    state = ends[None, :] & (everything | own | (key < anchor_size))
    recent = (key >= query - window) & (everything | own)
    return (key <= query) & (state | recent)


def mixer(x: torch.Tensor, weights: Weights, name: str, ends: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """(T, dim) output of one state space mixer, whose convolution and state start anew after each end of a chunk."""
    heads, inner, state = config["ssm_heads"], config["ssm_inner"], config["ssm_state_dim"]
    conv, a = weights[f"{name}.conv_weight"], -weights[f"{name}.A_log"].exp()
    skip, taps = weights[f"{name}.D"], config["conv_size"]
    outputs = []
    past: list[torch.Tensor] = []
    memory = x.new_zeros(heads, inner // heads, state)
    for token in range(len(x)):
        if token and ends[token - 1]:
            past, memory = [], torch.zeros_like(memory)
        z, row, dt = (weights[f"{name}.in_proj.weight"] @ x[token]).split([inner, inner + 2 * state, heads])
        past.append(row)
        recent = past[-taps:]
        row = functional.silu((conv[:, taps - len(recent) :] * torch.stack(recent, 1)).sum(1))
        u, b, c = row.split([inner, state, state])
        u, dt = u.view(heads, -1), functional.softplus(dt)
        memory = torch.exp(dt * a)[:, None, None] * memory + (dt[:, None] * u)[..., None] * b
        y = (memory @ c + skip[:, None] * u).flatten()
        outputs.append(rms_norm(y * functional.silu(z), weights[f"{name}.ssm_norm.weight"], config["rms_norm_eps"]))
    return torch.stack(outputs) @ weights[f"{name}.out_proj.weight"].T


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Interleaved rotary embedding of (T, heads, head size) at positions 0 to T - 1."""
    size = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(len(x))[:, None] * frequencies
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
