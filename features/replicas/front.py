"""Replicas where requests arrive: over which a prompt may be split."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from typing import Any

from starling.attention_backends.star.refusals import options_of
from starling.features.front_request import FrontRequest
from starling.features.replicas.rules import replica_set
from starling.features.replicas.split.split_prefill import SplitPrefill, is_split
from starling.features.replicas.split.split_state import SplitState
from starling.scheduler.planning.decide import refuse_above_one_replica
from starling.scheduler.planning.facts import EngineFacts
from starling.scheduler.planning.request_metadata import default_num_shards


class Replicas:
    """Front side of split prompts.

    Attributes:
        state: calls to the replicas, and the prompts that are split now.
        replicas: the replicas over which a prompt may be split.
        divides_kv: whether prompts may be longer than the memory of one replica.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.state = SplitState(options_of(vllm_config).replicas)
        self.replicas = replica_set(vllm_config)
        self.divides_kv = default_num_shards(vllm_config) > 1

    def outputs(self, request: FrontRequest, facts: EngineFacts) -> AsyncGenerator[Any, None] | None:
        """Return the outputs of a request whose prompt is split, or None if vLLM chooses a replica for it.

        Args:
            facts: the state of the engine now.

        Raises:
            OptionError: the request can't run.
        """
        plan = None if request.decision is None else request.decision.plan
        if plan is None:
            return None
        if is_split(request):
            return SplitPrefill(self.state, request, facts.page_size or 1).outputs()
        if plan.shards:  # vLLM would never schedule it, nor the requests behind it
            refuse_above_one_replica(plan.num_prompt_tokens, facts)
        return None

    def waiting(self) -> Collection[str]:
        """Return the ids of split requests, which the engine may not know yet, or any more."""
        return list(self.state.split_requests)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End split requests that the engine does not know. vLLM ends the others."""
        for request_id in request_ids:
            self.state.split_requests.abort(request_id)


make = Replicas
