"""Reference for the tests: whole models with KV shifting attention in plain float32 torch.

The file uses no pages, no chunks, no vLLM and none of the served models' code. Tensors have their checkpoint names, and
the configuration is the checkpoint's JSON (arXiv 2411.19574, section 2; Baichuan-M1's layout).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from starling.attention_backends.kernels.reference import masked_attention

Tensors = Mapping[str, torch.Tensor]


def shift_reference(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``previous * x_{i-1} + current * x_i`` with x_{-1} = 0, one token at a time.

    Args:
        x: (tokens, KV heads, head size).
        weights: (1, 1, KV heads, 1, 2), columns [previous, current].

    Returns:
        The shape of ``x``.
    """
    previous, current = weights.reshape(-1, 2)[..., None].unbind(1)
    before = torch.zeros_like(x[0])
    shifted = []
    for token in x:
        shifted.append(previous * before + current * token)
        before = token
    return torch.stack(shifted)


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """NeoX RoPE of (tokens, heads, head size) at positions 0, 1, ..."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(len(x), dtype=x.dtype)[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = x[..., :half], x[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def layer_heads(config: Mapping[str, Any], layer: int) -> tuple[int, int, int | None]:
    """(query heads, KV heads, sliding window in tokens or None) of a layer."""
    if layer in (config.get("sliding_window_layers") or ()):
        return config["num_swa_attention_heads"], config["num_swa_key_value_heads"], config["sliding_window"]
    return config["num_attention_heads"], config["num_key_value_heads"], None


def project(tensors: Tensors, prefix: str, x: torch.Tensor) -> torch.Tensor:
    """Return queries, keys and values concatenated: (tokens, (query heads + 2 * KV heads) * head size)."""
    if f"{prefix}.W_pack.weight" in tensors:
        return x @ tensors[f"{prefix}.W_pack.weight"].T
    return torch.cat([x @ tensors[f"{prefix}.{name}_proj.weight"].T for name in "qkv"], dim=-1)


def attention(
    config: Mapping[str, Any], tensors: Tensors, layer: int, x: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Output of one attention layer, (tokens, hidden size).

    Args:
        x: (tokens, hidden size).
        mask: (tokens, tokens) bool, which key (column) a query (row) sees in layers without a sliding window.
    """
    prefix = f"model.layers.{layer}.self_attn"
    heads, kv_heads, window = layer_heads(config, layer)
    size = config.get("head_dim") or config["hidden_size"] // heads
    query, key, value = project(tensors, prefix, x).split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    theta = config["rope_theta"]
    key = shift_reference(key.unflatten(-1, (kv_heads, size)), tensors[f"{prefix}.conv_k"])
    value = shift_reference(value.unflatten(-1, (kv_heads, size)), tensors[f"{prefix}.conv_v"])
    query, key = rotate(query.unflatten(-1, (heads, size)), theta), rotate(key, theta)
    if window is not None:
        positions = torch.arange(len(x))
        # Star Attention does not change windowed layers: they are causal within their window under any mask.
        mask = (positions <= positions[:, None]) & (positions > positions[:, None] - window)
    out, _ = masked_attention(query, key, value, mask, size**-0.5)
    return out.flatten(1) @ tensors[f"{prefix}.o_proj.weight"].T


def logits(
    config: Mapping[str, Any], tensors: Tensors, ids: list[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(tokens, vocabulary) logits of a whole sequence.

    Args:
        config: config.json of the checkpoint, with ``rope_theta`` at the top level.
        tensors: the checkpoint in float32.
        ids: token ids.
        mask: (tokens, tokens) bool, which key (column) a query (row) sees in layers without a sliding window; None for
            the causal mask.
    """
    if mask is None:
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    eps = config["rms_norm_eps"]
    x = tensors["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        normed = rms_norm(x, tensors[f"{prefix}.input_layernorm.weight"], eps)
        x = x + attention(config, tensors, layer, normed, mask)
        normed = rms_norm(x, tensors[f"{prefix}.post_attention_layernorm.weight"], eps)
        gate, up, down = (tensors[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    table = tensors["lm_head.weight"]
    if config["model_type"] == "baichuan_m1":
        table = table / (table.norm(dim=-1, keepdim=True) + 1e-7)
    return rms_norm(x, tensors["model.norm.weight"], eps) @ table.T
