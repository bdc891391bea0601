"""What the content of a page depends on beside its key: engines whose pages are the same have the same identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from starling.vllm_compat.config import cpu_attention_isa

LENGTH = 16


def described(vllm_config: Any, weights: Sequence[str]) -> dict[str, Any]:
    """What an identity stands for. The layout of pages is in the name of the files' folder too (tier.py).

    The model's name is in neither: a path may be written in several ways, and another model has other weights.

    Args:
        weights: the digest of each worker's weights, by rank.
    """
    config = vllm_config.model_config.hf_text_config.to_dict()
    config.pop("_name_or_path", None)
    return {
        "weights": list(weights),
        "model_config": digest(config),
        "vllm": version("vllm"),
        "starling": version("vllm-starling"),
        "key_hash": vllm_config.cache_config.prefix_caching_hash_algo,
        "attention_backend": str(vllm_config.attention_config.backend),
        "layout": str(vllm_config.cache_config.kv_cache_layout),
        "cpu_layout": cpu_attention_isa(vllm_config),
        "quantization": str(vllm_config.model_config.quantization),
    }


def identity_of(description: dict[str, Any]) -> str:
    """The name of an identity: LENGTH hexadecimal digits."""
    return digest(description)[:LENGTH]


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
