"""Identity of an engine's pages, from what their content depends on beside their keys: equal pages, equal identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

from starling.vllm_compat.config import attention_layer, page_layout

LENGTH = 16


def layouts_of(vllm_config: Any, layers: Iterable[str]) -> dict[str, str]:
    """Return how each layer of a worker lays out the inside of its pages, as its backend has chosen, by layer name.

    The host does not matter: a GPU's pages are the same on every host.
    """
    default = vllm_config.cache_config.cache_dtype
    found = {}
    for name in layers:
        dtype = getattr(attention_layer(vllm_config, name), "kv_cache_dtype", default)
        stored = vllm_config.model_config.dtype if dtype == "auto" else dtype
        found[name] = page_layout(vllm_config, name, str(stored).removeprefix("torch."))
    return found


def described(vllm_config: Any, weights: Sequence[str], layouts: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Return what an identity stands for.

    The sizes of pages are in the name of the files' folder too (tier.py). The model's name is in neither: a path may be
    written in several ways, and another model has other weights.

    Args:
        weights: the digest of each worker's weights, by rank.
        layouts: what each worker's ``layouts_of`` returned, by rank.
    """
    config = vllm_config.model_config.hf_text_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    return {
        "weights": list(weights),
        "model_config": digest(config),
        "long_rope": uses_long_rope(config, vllm_config.model_config.max_model_len),
        "vllm": version("vllm"),
        "starling": version("vllm-starling"),
        "key_hash": vllm_config.cache_config.prefix_caching_hash_algo,
        "layouts": list(layouts),
        "quantization": str(vllm_config.model_config.quantization),
    }


def uses_long_rope(config: dict[str, Any], max_model_len: int) -> bool:
    """Return whether vLLM rotates keys by LongRoPE's long factors for prompts that need them."""
    rope = config.get("rope_parameters") or {}
    return rope.get("rope_type") == "longrope" and max_model_len > rope["original_max_position_embeddings"]


def identity_of(description: dict[str, Any]) -> str:
    """Return the name of an identity, LENGTH hexadecimal digits."""
    return digest(description)[:LENGTH]


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


MAGIC = b"starling page 1\n"
DIGEST_BYTES = 32
STAMP_BYTES = len(MAGIC) + DIGEST_BYTES


def stamp_of(key: bytes, content: memoryview) -> bytes:
    """Return the stamp of a page: STAMP_BYTES bytes, MAGIC and then a digest of its key and its content (BLAKE2b)."""
    digest = hashlib.blake2b(key, digest_size=DIGEST_BYTES)
    digest.update(content)
    return MAGIC + digest.digest()


def write_stamp(chunk: memoryview, key: bytes) -> None:
    """Write the stamp of a page into the last bytes of its chunk, which hold nothing else."""
    chunk[-STAMP_BYTES:] = stamp_of(key, chunk[:-STAMP_BYTES])


def has_stamp(chunk: memoryview, key: bytes) -> bool:
    """Return whether a chunk has the stamp of its content under this key."""
    return chunk[-STAMP_BYTES:] == stamp_of(key, chunk[:-STAMP_BYTES])
