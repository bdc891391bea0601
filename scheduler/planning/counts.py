"""Query-key pairs of a star plan, and the plan as a response shows it."""

from __future__ import annotations

from typing import Any

import numpy as np

from starling.scheduler.planning.plan import StarPlan, count_pairs


def num_context_tokens(plan: StarPlan) -> int:
    """Tokens of the context as the client sent it."""
    return plan.client_starts[-1] if plan.documents else plan.context_end


def num_client_tokens(plan: StarPlan) -> int:
    """Tokens of the prompt as the client sent it."""
    return num_context_tokens(plan) + plan.num_prompt_tokens - plan.context_end


def context_pairs(plan: StarPlan) -> int:
    """Query-key pairs of the context, per head and layer; with dense heads a mean of both kinds.

    Blocks behind the first few see equally many tokens before them, so only these few are looked at one by one.
    """
    few = min((plan.anchor_size + plan.overlap_size) // plan.block_size + 2, len(plan.starts))
    seen = np.zeros_like(plan.lengths)
    for number in range(few):
        seen[number:] = sum(stop - start for start, stop in plan.block(number).sees)
    pairs = int((plan.lengths * seen + plan.lengths * (plan.lengths + 1) // 2).sum())
    return mean_pairs(plan, pairs, dense_keys(int(plan.lengths.sum())))


def mean_pairs(plan: StarPlan, star: int, dense: int) -> int:
    """Query-key pairs of a head on average, of which some see star blocks and some everything."""
    share = 0.0 if plan.dense_heads is None else plan.dense_heads.share
    return round((1 - share) * star + share * dense) if share else star


def keys_attended(plan: StarPlan) -> int:
    """Query-key pairs of the whole prompt, per head and layer."""
    queries = plan.num_prompt_tokens - plan.context_end
    return context_pairs(plan) + count_pairs(queries, ((0, num_client_tokens(plan)),))


def dense_keys(num_tokens: int) -> int:
    """Query-key pairs of a prompt under dense causal prefill."""
    return num_tokens * (num_tokens + 1) // 2


def summary(plan: StarPlan) -> dict[str, Any]:
    """Return the plan as a response shows it, without padding: its sizes, and the attended keys."""
    context, tokens = num_context_tokens(plan), num_client_tokens(plan)
    in_context = context_pairs(plan)
    return {
        "attention": "star",
        "star_blocks": len(plan.starts),
        "block_size": plan.block_size,
        "anchor_size": plan.anchor_size,
        "overlap_size": plan.overlap_size,
        "context_end": context,
        "prompt_tokens": tokens,
        "replicas": plan.replicas,
        "shards": plan.shards,
        "dense_heads": 0.0 if plan.dense_heads is None else round(plan.dense_heads.share, 4),
        "kv_heads": 0 if plan.dense_heads is None else plan.dense_heads.total,
        "documents": bool(plan.documents),
        "adapter": bool(plan.adapter),
        "padding_tokens": plan.num_prompt_tokens - tokens,
        "keys_attended": in_context + count_pairs(tokens - context, ((0, tokens),)),
        "dense_keys": dense_keys(tokens),
        "keys_per_context_token": round(in_context / max(context, 1), 1),
    }


def describe(
    plan: StarPlan | None, num_prompt_tokens: int, model: Any = None, why: str | None = None
) -> dict[str, Any]:
    """Describe the plan, or that the prompt runs dense, as a response and the live page show it.

    Args:
        model: the text model's configuration. Where it has ``prompt_keys``, that counts the attended keys.
        why: as a Decision has it.
    """
    dense: dict[str, Any] = {"attention": "dense", "prompt_tokens": num_prompt_tokens}
    shown = (dense if plan is None else summary(plan)) | (model_keys(plan, num_prompt_tokens, model) or {})
    return shown if why is None else shown | {"why": why}


def model_keys(plan: StarPlan | None, num_prompt_tokens: int, model: Any) -> dict[str, Any] | None:
    """Return the attended keys of a model that counts them itself, or None if the plan's own counts hold.

    Args:
        model: the text model's configuration. Where it has ``prompt_keys``, that counts the attended keys.
    """
    count_keys = getattr(model, "prompt_keys", None)
    return count_keys(plan, num_prompt_tokens) if count_keys else None
