"""Reference for the tests: Attamba by its definition, in plain torch.

The mixers are a loop over tokens, and attention uses an explicit mask. Sources: arXiv 2411.17685, section 3; mixers:
arXiv 2405.21060. It shares nothing with the served model but the weights' names.
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
    """(T, vocabulary) logits of a whole sequence.

    Args:
        weights: tensors of the checkpoint by name.
        config: config.json of the checkpoint.
        tokens: (T,) token ids.
        star: sizes of Star Attention, the keyword arguments of ``star_mask``; None for dense attention.
    """
    layers, chunk_size, window = config["num_hidden_layers"], config["token_chunk"], config["leading_tokens"]
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    positions = torch.arange(len(tokens))
    hidden = weights["tok_embeddings.weight"][tokens]
    for layer in range(layers):
        offset = min(chunk_size - 1, layer * (chunk_size // layers))
        ends = (positions + 1 + offset) % chunk_size == 0
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
        probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", probabilities, value.unflatten(-1, (heads, -1)))
        hidden = hidden + attended.flatten(1) @ own["attentive_ssm.wo.weight"].T
        x = rms_norm(hidden, own["ffn_norm.weight"], eps)
        w1, w2, w3 = (own[f"feed_forward.w{number}.weight"] for number in (1, 2, 3))
        hidden = hidden + (functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    return rms_norm(hidden, weights["norm.weight"], eps) @ weights["output.weight"].T


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def attention_mask(num_tokens: int, ends: torch.Tensor, window: int) -> torch.Tensor:
    """(num_tokens, num_tokens) bool, True where a query (row) sees a key (column).

    A query sees all ends of chunks before it, the ``window`` tokens before it, and itself.

    Args:
        ends: (num_tokens,) bool, whether a token ends a chunk.
        window: L in tokens.
    """
    query, key = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None, :]
    return (key <= query) & (ends[None, :] | (key >= query - window))


def star_mask(
    num_tokens: int, ends: torch.Tensor, window: int, *, block_size: int, anchor_size: int, context_end: int
) -> torch.Tensor:
    """Return the mask of ``attention_mask`` under Star Attention (arXiv 2411.17116, section 2).

    Star Attention changes neither the chunks nor their states. A chunk belongs to the star block that its end lies in.
    A chunk that begins in the block before includes that block's last tokens. A query of the context sees

    - the ends of chunks in the anchor, the first ``anchor_size`` tokens, and in its own star block. Token 0 is such an
      end: without an anchor, only queries of block 0 see it;
    - itself and those of the ``window`` tokens before it that lie in its own star block.

    A query at ``context_end`` or later sees the same keys as without Star Attention. Sizes are tokens.
    """
    query, key = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None, :]
    everything = query >= context_end
    own = query // block_size == key // block_size
    state = ends[None, :] & (everything | own | (key < anchor_size))
    recent = (key >= query - window) & (everything | own)
    return (key <= query) & (state | recent)


def mixer(x: torch.Tensor, weights: Weights, name: str, ends: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """(T, dim) output of one state space mixer. Its convolution and its state restart after each end of a chunk.

    Args:
        x: (T, dim).
        weights: of the layer, by name.
        name: of the mixer: k_ssm or v_ssm.
        ends: (T,) bool, whether a token ends a chunk.
        config: config.json of the checkpoint.
    """
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
