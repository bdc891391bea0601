"""Replicas where requests arrive: over which a prompt may be split."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any

from starling.features.front_part import FrontPart, FrontRequest
from starling.features.replicas.rules import replica_set
from starling.features.replicas.split.split_prefill import SplitPrefill, is_split
from starling.features.replicas.split.split_state import SplitState
from starling.features.rule import options_of
from starling.scheduler.star.decide import refuse_above_one_replica
from starling.scheduler.star.facts import EngineFacts
from starling.scheduler.star.request_metadata import default_num_shards


class Replicas(FrontPart):
    """Runs the prompts that are split over replicas.

    Attributes:
        state: what the front keeps of the replicas.
    """

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.state = SplitState(options_of(vllm_config).replicas)
        self.replicas = replica_set(vllm_config)

    def facts(self) -> Mapping[str, Any]:
        return {"replicas": self.replicas, "divides_kv": default_num_shards(self.vllm_config) > 1}

    def outputs(self, request: FrontRequest, facts: EngineFacts) -> AsyncGenerator[Any, None] | None:
        plan = None if request.decision is None else request.decision.plan
        if plan is None:
            return None
        if is_split(request):
            return SplitPrefill(self.state, request, facts.page_size or 1).outputs()
        if plan.shards:  # vLLM would never schedule it, nor the requests behind it
            refuse_above_one_replica(plan.num_prompt_tokens, facts)
        return None

    def waiting(self) -> Collection[str]:
        return list(self.state.split_requests)

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.state.split_requests.abort(request_id)


PARTS = (Replicas.make,)
