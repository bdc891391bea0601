"""What is known of an engine: the facts that plans are decided by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starling.features import make_parts
from starling.features.front_part import FrontPart
from starling.scheduler.star.facts import EngineFacts
from starling.vllm_compat.config import page_size_before_start


def star_page_size(vllm_config: Any) -> int:
    """Tokens of a full-attention KV page, as far as the configuration says before the engine has started."""
    own = getattr(vllm_config.model_config.hf_text_config, "page_tokens", None)
    return own or page_size_before_start(vllm_config)


def engine_facts(vllm_config: Any, page_size: int | None, parts: Sequence[FrontPart] | None = None) -> EngineFacts:
    """What is known of an engine, as far as its configuration and the reports of engine cores that have started say.

    Args:
        page_size: tokens of a KV page of the full-attention layers.
        parts: of a front of the engine, where it has them already.
    """
    parts = make_parts("front", vllm_config) if parts is None else parts
    facts = {name: fact for part in parts for name, fact in part.facts().items()}
    return EngineFacts(
        page_size,
        max_prompt_tokens=vllm_config.model_config.max_model_len - 1,  # a prompt leaves room for one token of output
        changes=tuple(part.planned for part in parts),
        **facts,
    )
