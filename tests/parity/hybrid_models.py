"""Tiny random hybrid models: layers that carry a state, and full-attention layers, whose KV page has 64 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PAGE_SIZE = 64
LAYERS = ["linear_attention", "full_attention"] * 2
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
}
# Each family's state takes as much memory as the keys and values of at most 64 tokens.
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "granite": (
        "GraniteMoeHybridConfig",
        {
            "layer_types": LAYERS,
            "num_hidden_layers": 4,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
            "position_embedding_type": "rope",
            "attention_multiplier": 32**-0.5,
        }
        | MAMBA2,
        torch.float32,
    ),
    "falcon": (  # each layer has a Mamba-2 mixer and full attention side by side
        "FalconH1Config",
        {"num_hidden_layers": 2, "mamba_d_ssm": 256, "mamba_n_groups": 1} | MAMBA2,
        torch.float32,
    ),
    "qwen": (  # gated delta nets; vLLM's CPU kernels of them take bfloat16 alone
        "Qwen3_5TextConfig",
        {
            "layer_types": LAYERS,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
        torch.bfloat16,
    ),
}


def make_random_hybrid(path: Path, family: str) -> Path:
    """Write a checkpoint of a family, with attention that is sharp enough for a wrong mask to change the logits."""
    import transformers

    config_class, fields, dtype = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**SIZES | fields))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                scale = 3.0 if any(sharp in name for sharp in ("q_proj", "k_proj", "o_proj")) else 1.0
                weight.normal_(0, scale * weight.shape[1] ** -0.5)
            elif "q_norm" in name or "k_norm" in name:
                weight.fill_(1.0)  # Qwen's norms multiply by one more than their weight
    model.to(dtype).save_pretrained(path)
    return path
