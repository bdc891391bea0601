"""Whether a model's star blocks are independent: the KV of one needs only the anchor and itself."""

from __future__ import annotations

from typing import Any

MIXES_TOKENS = ("kv_shift_llama", "baichuan_m1", "attamba")


def dependence(model_config: Any) -> str | None:
    """Why a model's star blocks depend on one another, as far as its configuration tells; None: they don't.

    For whoever wants a block's KV without the block before it. Says nothing of an overlap, which a plan asks for.

    Args:
        model_config: vLLM's ModelConfig.
    """
    text = model_config.hf_text_config
    kinds = getattr(text, "layer_types", None) or ()
    windows = any(kind not in ("full_attention", "attention") for kind in kinds)
    if windows or model_config.get_sliding_window() is not None or model_config.is_hybrid:
        return "layers that are not full attention (sliding-window, linear, Mamba) carry state across block borders"
    kind = getattr(text, "model_type", None)
    if kind in MIXES_TOKENS:
        return f"{kind} mixes a token with the ones before it, across block borders"
    return None
