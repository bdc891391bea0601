"""Independence of a model's star blocks: the KV of one needs only the anchor and itself."""

from __future__ import annotations

from typing import Any

FULL_ATTENTION = ("full_attention", "attention")
HYBRID = "hybrid"  # full attention and layers that carry a state, side by side in one layer (Falcon-H1, Zamba2)


def dependence(model_config: Any) -> str | None:
    """Why a model's star blocks depend on one another, as far as its configuration says; None: they don't.

    Where they depend on one another, the KV of a block can't be computed or reused without the block before it. An
    overlap, which a plan may ask for, is another reason that this function does not look at.

    Args:
        model_config: vLLM's ModelConfig. Starling's own model configurations have the attribute ``star_blocks_depend``.
    """
    text = model_config.hf_text_config
    reason: str | None = getattr(text, "star_blocks_depend", None)
    if reason is not None:
        return reason
    kinds = set(getattr(text, "layer_types", None) or ()) - set(FULL_ATTENTION)
    kinds |= {"sliding window"} if model_config.get_sliding_window() is not None else set()
    kinds |= {HYBRID} if model_config.is_hybrid else set()
    if kinds:
        return f"layers that are not full attention ({', '.join(sorted(kinds))}) carry state across block borders"
    return None
