"""Random checkpoints with KV shifting attention, for tests and benchmarks: fixed seed, no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.random_llama import byte_tokenizer
from starling.engine_ext.models import configs, kv_shift

TINY_LLAMA = {
    "model_type": "kv_shift_llama",
    "architectures": ["KVShiftLlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 30000.0,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 256,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
# Has both kinds of layers. Their heads and head sizes differ: 4 query heads of 32, and 2 of 64 in windowed layers. So a
# token has different KV bytes in them.
TINY_BAICHUAN = TINY_LLAMA | {
    "model_type": "baichuan_m1",
    "architectures": ["BaichuanM1ForCausalLM"],
    "num_hidden_layers": 4,
    "num_swa_attention_heads": 2,
    "num_swa_key_value_heads": 2,
    "sliding_window": 40,
    "sliding_window_layers": [1, 3],
    "conv_window": 2,
}
FAMILIES: dict[str, tuple[type, Any]] = {
    "kv_shift_llama": (configs.KVShiftLlamaConfig, kv_shift.llama_tensors),
    "baichuan_m1": (configs.BaichuanM1Config, kv_shift.baichuan_tensors),
}


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a checkpoint's random tensor: weights so wide that attention and shift affect the logits; norms of one."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(("conv_k", "conv_v")):
        return torch.empty(shape).uniform_(-0.5, 1.0)  # trained weights may be negative
    scale = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight", "W_pack.weight")) else 1.0
    return torch.empty(shape).normal_(0, scale * shape[-1] ** -0.5)


def make_random_kv_shift(
    path: Path, config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a checkpoint of either family with random tensors and a byte-level tokenizer.

    Args:
        path: folder to write.
        config: fields of config.json, with ``model_type``.
        seed: seed of the tensors.
        dtype: dtype of the checkpoint.

    Returns:
        ``path``.
    """
    path.mkdir(parents=True, exist_ok=True)
    config_class, expected_tensors = FAMILIES[config["model_type"]]
    torch.manual_seed(seed)
    shapes = expected_tensors(config_class(**config))
    save_file(
        {name: random_tensor(name, shape).to(dtype) for name, shape in shapes.items()}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=1))
    byte_tokenizer().save_pretrained(path)
    return path
