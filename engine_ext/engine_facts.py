"""Facts of an engine that decide how its prompts are planned."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from starling.attention_backends.star.model_heads import scores_of
from starling.attention_backends.star.refusals import (
    document_refusals,
    heads_refusals,
    is_attamba,
    options_of,
    star_refusals,
)
from starling.features import make_features
from starling.scheduler.star.facts import ONE_REPLICA, EngineFacts
from starling.vllm_compat.config import page_size_before_start

NO_OVERLAP = "an Attamba model's window ends at the border of a star block, and an overlap would go beyond it"


def star_page_size(vllm_config: Any) -> int:
    """Return the tokens of a full-attention KV page, as far as the configuration says before the engine's start."""
    own = getattr(vllm_config.model_config.hf_text_config, "page_tokens", None)
    return own or page_size_before_start(vllm_config)


def engine_facts(vllm_config: Any, page_size: int | None, features: Mapping[str, Any] | None = None) -> EngineFacts:
    """Return the facts of an engine from its configuration and the reports of engine cores that have started.

    Args:
        page_size: tokens of a KV page of the full-attention layers.
        features: the features' objects in a front of the engine, or None to make them.
    """
    features = make_features("front", vllm_config) if features is None else features
    replicas, retention, adapter = map(features.get, ("replicas", "retention", "adapter"))
    return EngineFacts(
        page_size,
        refusals=tuple(star_refusals(vllm_config)),
        find_document_refusals=functools.cache(lambda: tuple(document_refusals(vllm_config))),
        find_heads=functools.cache(lambda: scores_of(vllm_config)),
        find_heads_refusals=functools.cache(lambda: tuple(heads_refusals(vllm_config))),
        retention_refusals=("the server has no retention",) if retention is None else retention.refusals,
        overlap_refusal=NO_OVERLAP if is_attamba(vllm_config) else None,
        replicas=ONE_REPLICA if replicas is None else replicas.replicas,
        max_prompt_tokens=vllm_config.model_config.max_model_len - 1,  # a prompt leaves room for one token of output
        divides_kv=replicas is not None and replicas.divides_kv,
        quality_sizes=options_of(vllm_config).quality_sizes,
        with_adapter=None if adapter is None else adapter.planned,
    )
