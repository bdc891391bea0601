"""A constructed, untrained model that does induction exactly at any length: an oracle for retrieval.

The model is one layer of KV shifting attention with a = (0, 1) and b = (1, 0): a key encodes the token before its
position, a value encodes the token at its position. A query finds the position after an earlier occurrence of its token
and reads the token there. If a token occurred exactly once before, the greedy answer is the token that followed it, at
any distance (arXiv 2411.19574, section 3).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.kv_shift.random_model import TINY_LLAMA

VOCABULARY, WIDTH = 320, 512
THETA = 1e38
"""So large that RoPE rotates only the first pairs of dimensions, up to about 100,000 positions."""
ROTATED_PAIRS = 43
"""Pairs that the codes do not use. RoPE rotates the others by at most theta ** -(43 / 256) = 4e-7 per position."""
SHARPNESS, GAIN = 60.0, 10.0


def token_dimensions() -> torch.Tensor:
    """Return (VOCABULARY,) the dimension of each token's code. RoPE pairs dimension i with WIDTH / 2 + i."""
    fixed = torch.arange(ROTATED_PAIRS, WIDTH // 2)
    return torch.cat((fixed, WIDTH // 2 + fixed))[:VOCABULARY]


def oracle_tensors() -> dict[str, torch.Tensor]:
    """Return the tensors of a KVShiftLlamaForCausalLM checkpoint, by name."""
    codes = torch.zeros(VOCABULARY, WIDTH)
    codes[torch.arange(VOCABULARY), token_dimensions()] = 1.0
    unit = torch.eye(WIDTH)
    # RMSNorm makes a code WIDTH ** 0.5 long, and attention divides scores by WIDTH ** 0.5: a match scores SHARPNESS.
    layer = {
        "self_attn.q_proj.weight": unit * (SHARPNESS * WIDTH**-0.5),
        "self_attn.k_proj.weight": unit,
        "self_attn.v_proj.weight": unit.clone(),
        # The token that attention reads outweighs the token itself, which the residual adds.
        "self_attn.o_proj.weight": unit * (GAIN * WIDTH**-0.5),
        "self_attn.conv_k": torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 1, 2),  # columns [previous, current]
        "self_attn.conv_v": torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 1, 2),
        "mlp.gate_proj.weight": torch.zeros(1, WIDTH),
        "mlp.up_proj.weight": torch.zeros(1, WIDTH),
        "mlp.down_proj.weight": torch.zeros(WIDTH, 1),
        "input_layernorm.weight": torch.ones(WIDTH),
        "post_attention_layernorm.weight": torch.ones(WIDTH),
    }
    outer = {
        "model.embed_tokens.weight": codes,
        "lm_head.weight": codes.clone(),
        "model.norm.weight": torch.ones(WIDTH),
    }
    return outer | {f"model.layers.0.{name}": tensor for name, tensor in layer.items()}


def make_induction_oracle(path: Path) -> Path:
    """Write the checkpoint, without a tokenizer, to a folder; returns the folder."""
    path.mkdir(parents=True, exist_ok=True)
    config = TINY_LLAMA | {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 131072,
        "rope_theta": THETA,
        "dtype": "float32",
    }
    save_file(oracle_tensors(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config, indent=1))
    return path
