"""What is known of an engine: the facts that plans are decided by."""

from __future__ import annotations

import functools
from typing import Any

from starling.features.adapter.lora import adapter_of
from starling.features.dense_heads.head_scores import scores_of
from starling.features.dense_heads.rules import heads_refusals
from starling.features.documents.rules import document_refusals
from starling.features.replicas.rules import replica_set
from starling.features.rule import options_of
from starling.features.star.rules import is_attamba, star_refusals
from starling.scheduler.star.facts import EngineFacts
from starling.scheduler.star.request_metadata import default_num_shards
from starling.vllm_compat.config import page_size_before_start

NO_OVERLAP = "an Attamba model's window ends at the border of a star block, and an overlap would go beyond it"


def star_page_size(vllm_config: Any) -> int:
    """Tokens of a full-attention KV page, as far as the configuration says before the engine has started."""
    own = getattr(vllm_config.model_config.hf_text_config, "page_tokens", None)
    return own or page_size_before_start(vllm_config)


def engine_facts(vllm_config: Any, page_size: int | None) -> EngineFacts:
    """What is known of an engine, as far as its configuration and the reports of engine cores that have started say.

    Args:
        page_size: tokens of a KV page of the full-attention layers.
    """
    return EngineFacts(
        page_size,
        tuple(star_refusals(vllm_config)),
        functools.cache(lambda: tuple(document_refusals(vllm_config))),
        functools.cache(lambda: scores_of(vllm_config)),
        functools.cache(lambda: tuple(heads_refusals(vllm_config))),
        NO_OVERLAP if is_attamba(vllm_config) else None,
        replica_set(vllm_config),
        vllm_config.model_config.max_model_len - 1,  # a prompt leaves room for one token of output
        divides_kv=default_num_shards(vllm_config) > 1,
        quality_sizes=options_of(vllm_config).quality_sizes,
        adapter=adapter_of(options_of(vllm_config)),
    )
