"""Attention backends of a worker: their registration, and the check that the loaded model's layers run on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starling.attention_backends.paged.names import CLASSES, register_paged_backend
from starling.attention_backends.star.backend import register_star_backends, takes_star
from starling.config.entry import config_of


def register_backends(vllm_config: Any, refusals: list[str], by_parts: bool) -> None:
    """Register the star backends in this process if star can run, and always on CPU.

    On GPUs a star backend has smaller full CUDA graphs and larger buffers than vLLM's. On CPU it also has Starling's
    attention op, which dense batches use too.

    Args:
        vllm_config: configuration of the engine.
        refusals: why star can't run; empty if it can.
        by_parts: whether layers on a GPU are made to attend by the documents or the dense heads of a step.
    """
    is_cpu = vllm_config.device_config.device_type == "cpu"
    config = config_of(vllm_config)
    own = config.gpu_attention if config and config.gpu_attention in CLASSES else None
    if own:
        register_paged_backend(own)
    if is_cpu or not refusals:
        register_star_backends(own, by_parts)
    if is_cpu and vllm_config.lora_config is not None:
        from starling.attention_backends.kernels.cpu.lora import use_own_lora

        use_own_lora()


def unsplit_layers(builders: Sequence[tuple[Any, Sequence[str]]]) -> str | None:
    """Return why a model can't run star rows on the metadata builders of its layers, or None if it can.

    All full-attention layers must split their rows. A layer that does not would attend to the whole prompt, and its KV
    would then be cached as that of independent star blocks.

    Args:
        builders: (metadata builder, names of its layers), for all layers.
    """
    splits = [getattr(builder, "takes_star", False) for builder, _ in builders]
    unable = {
        type(builder).__name__
        for (builder, _), able in zip(builders, splits, strict=True)
        if not able and getattr(builder, "holds_keys", True) and takes_star(getattr(builder, "kv_cache_spec", None))
    }
    if any(splits) and not unable:
        return None
    names = ", ".join(sorted(unable or {type(builder).__name__ for builder, _ in builders}))
    which = "full-attention layers" if unable else "all layers"
    return f"{which} run on an attention backend that is not wrapped, with the metadata builders {names}"
