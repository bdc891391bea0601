"""Documents, in plain float32 torch: the reference for documents.

It computes a Llama from its checkpoint with two sets of positions: those behind the anchor for a token of a block, and
those of the prompt for the query. It rotates queries and keys from scratch for each, without paging, padding, or code
of the engine's.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def block_logprobs(
    model: Path, ids: list[int], pieces: list[tuple[int, int]], anchor_size: int, context_end: int
) -> torch.Tensor:
    """(len(ids) - 1,) log-probability of each of ``ids[1:]``.

    Args:
        model: path of a checkpoint of a Llama, or of an Ernie 4.5.
        ids: prompt and output.
        pieces: (start, stop) of each block of the context, the head first, which may be empty.
        anchor_size: tokens of the head that each block sees.
        context_end: index of the first token of the query.
    """
    true = torch.arange(len(ids))
    block = torch.full((len(ids),), -1)
    own = true.clone()
    for number, (start, stop) in enumerate(pieces):
        block[start:stop] = number
        if number:
            own[start:stop] = anchor_size + torch.arange(stop - start)
    query, key = true[:, None], true[None]
    is_query = query >= context_end
    sees = (key <= query) & ((block[:, None] == block[None]) | (key < anchor_size))
    return logprobs(model, ids, (own, sees & ~is_query), (true, (key <= query) & is_query))


def dense_logprobs(model: Path, ids: list[int]) -> torch.Tensor:
    """As block_logprobs, under dense attention: every token sees those before it, at its position in the prompt."""
    true = torch.arange(len(ids))
    nothing = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    return logprobs(model, ids, (true, nothing), (true, true[None] <= true[:, None]))


def logprobs(
    model: Path, ids: list[int], first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Log-probabilities under two sets of (positions, what a query sees); each query sees keys in one set alone."""
    config, weights = load(model)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    frequencies = frequencies_of(config, size)

    def rerotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # In float32, as Transformers and vLLM have them: at position 500 they are off by up to 3e-5.
        angles = torch.outer(positions.float(), frequencies)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        if config["model_type"] == "ernie4_5":  # pairs of neighbours
            left, right = x[..., ::2], x[..., 1::2]
            return torch.stack((left * cos - right * sin, right * cos + left * sin), -1).flatten(-2)
        left, right = x.chunk(2, -1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

    def norm(x: torch.Tensor, weight: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weights[weight]

    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        normed = norm(x, f"{name}input_layernorm.weight")
        q, k, v = (normed @ weights[f"{name}self_attn.{part}_proj.weight"].T for part in "qkv")
        q, k, v = (part.view(len(ids), -1, size) for part in (q, k, v))
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        scores = torch.full((heads, len(ids), len(ids)), float("-inf"))
        for positions, sees in (first, second):
            found = torch.einsum("qhd,khd->hqk", rerotated(q, positions), rerotated(k, positions)) * size**-0.5
            scores = torch.where(sees, found, scores)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + out @ weights[f"{name}self_attn.o_proj.weight"].T
        normed = norm(x, f"{name}post_attention_layernorm.weight")
        gate, up = (normed @ weights[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[f"{name}mlp.down_proj.weight"].T
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    found = (norm(x, "model.norm.weight") @ head.T).log_softmax(-1)
    return found[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def frequencies_of(config: dict, size: int) -> torch.Tensor:
    """(size / 2,) float32, the angles of one position."""
    settings = config.get("rope_parameters") or {}
    base = settings.get("rope_theta") or config.get("rope_theta") or 10000.0
    factor = settings.get("factor", 1.0) if settings.get("rope_type") == "linear" else 1.0
    return 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size) / factor


@functools.cache
def load(model: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The configuration and the float32 weights of a checkpoint."""
    weights = load_file(model / "model.safetensors")
    return json.loads((model / "config.json").read_text()), {name: one.float() for name, one in weights.items()}
