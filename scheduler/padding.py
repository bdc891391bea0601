"""Padding between documents: the engine core adds it to a prompt, and takes it off again.

So the front, the client and vLLM's limits and statistics of a front count the prompt as the client sent it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from starling.config.entry import StarlingConfig
from starling.scheduler.part import CorePart
from starling.scheduler.planning.plan import StarPlan, client_indexes, num_client_tokens, pad
from starling.scheduler.planning.request_metadata import metadata_of
from starling.vllm_compat.core_process import amend_requests


def padded_plan(request: Any) -> StarPlan | None:
    """Return the plan of a request whose prompt the engine core pads, or None if it does not.

    None for a part of a prompt that is split over replicas: a front has padded that, and counts its tokens itself.
    """
    metadata = metadata_of(request)
    plan = metadata.plan
    return plan if plan is not None and plan.documents and metadata.part is None else None


def with_padding(request: Any) -> Any:
    """Return an engine core's request with the padding of its plan, or the request itself if it needs none."""
    plan = padded_plan(request)
    if plan is None:
        return request
    padded = copy.copy(request)
    token_ids = request.prompt_token_ids
    # Since vLLM 0.34 a front sends them as a numpy array.
    padded.prompt_token_ids = pad(plan, token_ids if isinstance(token_ids, list) else token_ids.tolist())
    return padded


def without_padding(plan: StarPlan, logprobs: Any) -> Any:
    """Remove padding from the log-probabilities of the prompt's tokens but the first.

    That of a block's first token is its log-probability behind the block before it, and its padding. No KV depends on
    the block before.

    Args:
        logprobs: vLLM's tensors, with a row for each token of the padded prompt but the first.
    """
    rows = torch.from_numpy(client_indexes(plan)[1:] - 1)
    return logprobs.filter(rows)


def count_client_tokens(plan: StarPlan, stats: Any) -> None:
    """Change vLLM's prefill statistics of a request to tokens of the client's prompt.

    Padding that was computed counts as computed, so that it is not taken for a cache hit.
    """
    tokens = num_client_tokens(plan)
    computed = min(stats.num_prompt_tokens - stats.num_cached_tokens, tokens)
    cached = tokens - computed
    stats.num_prompt_tokens = tokens
    stats.num_cached_tokens = cached
    stats.num_external_cached_tokens = min(stats.num_external_cached_tokens, cached)  # fetched from other replicas
    stats.num_local_cached_tokens = cached - stats.num_external_cached_tokens
    stats.num_computed_tokens = computed


class BlockPadding(CorePart):
    """Lets log-probabilities and outputs of padded prompts count the tokens that the client sent.

    Attributes:
        plans: of the requests whose prompts are padded.
    """

    def __init__(self, requests: dict[str, Any]) -> None:
        self.requests = requests
        self.plans: dict[str, StarPlan] = {}

    @classmethod
    def make(cls, scheduler: Any, config: StarlingConfig) -> BlockPadding:
        amend_requests(with_padding)
        return cls(scheduler.requests)

    def added(self, request: Any) -> None:
        plan = padded_plan(request)
        if plan is not None:
            self.plans[request.request_id] = plan

    def before_outputs(self, output: Any) -> None:
        logprobs = output.prompt_logprobs_dict
        for name in self.plans.keys() & logprobs.keys():
            logprobs[name] = without_padding(self.plans[name], logprobs[name])

    def outputs(self, outputs: dict[int, Any]) -> None:
        """Count in each first output, and forget the plans of ended requests."""
        if not self.plans:
            return
        for of_client in outputs.values():
            for output in of_client.outputs:
                plan = self.plans.get(output.request_id)
                if plan is not None and output.prefill_stats is not None:
                    count_client_tokens(plan, output.prefill_stats)
        self.plans = {name: plan for name, plan in self.plans.items() if name in self.requests}
