"""What a feature does where requests arrive: the hooks of a part, over which a front loops (engine_ext/front/)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vllm.outputs import CompletionOutput, RequestOutput

from starling.config.star import StarOptions
from starling.scheduler.star.decide import Decision
from starling.scheduler.star.facts import EngineFacts, PromptFacts
from starling.scheduler.star.plan import StarPlan

TRACE_HEADERS = "trace_headers"
"""vLLM's keyword of AsyncLLM.generate for the headers by which a span has its parent."""


@dataclass(frozen=True)
class FrontRequest:
    """A request that a front is about to give to its engine.

    Attributes:
        engine: the AsyncLLM.
        generate: vLLM's own AsyncLLM.generate, of this engine.
        prompt: the engine input.
        params: vLLM's SamplingParams or PoolingParams.
        request_id, keywords: of AsyncLLM.generate.
        decision: how the prompt is prefilled; None: it was not planned, since its tokens are not known.
        lora: the LoRA adapter (LoRARequest) that it runs with; None: none.
    """

    engine: Any
    generate: Callable[..., AsyncGenerator[Any, None]]
    prompt: Any
    params: Any
    request_id: str
    keywords: Mapping[str, Any]
    decision: Decision | None
    lora: Any = None

    def outputs(self) -> AsyncGenerator[Any, None]:
        """The request's outputs, as vLLM yields them."""
        return self.generate(self.prompt, self.params, self.request_id, **self.keywords)


def empty_output(
    request_id: str, token_ids: Sequence[int], num_choices: int, finish_reason: str = "abort"
) -> RequestOutput:
    """The last output of a request that the engine does not get."""
    choices = [
        CompletionOutput(index, "", [], cumulative_logprob=None, logprobs=[], finish_reason=finish_reason)
        for index in range(num_choices)
    ]
    return RequestOutput(request_id, None, list(token_ids), None, choices, finished=True, num_cached_tokens=0)


class FrontPart:
    """One feature's part of one front. The hooks do nothing here: a part has those that it needs.

    Parts are called in the order of features/__init__.py. `starling doctor` has them too.

    Args:
        vllm_config: vLLM's configuration of an engine, for which Starling is activated.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config

    @classmethod
    def make(cls, vllm_config: Any) -> Self | None:
        """The part; None: it has nothing to do here."""
        return cls(vllm_config)

    def facts(self) -> Mapping[str, Any]:
        """What the feature knows of the engine, as fields of EngineFacts, by which plans are decided."""
        return {}

    def hinted(self, decision: Decision, request: Any, facts: EngineFacts) -> Decision:
        """A prompt's decision, as hints that vLLM's own request (EngineCoreRequest) has change it.

        Raises:
            OptionError: a hint can't be followed.
        """
        return decision

    def planned(self, plan: StarPlan, options: StarOptions, prompt: PromptFacts) -> StarPlan:
        """The plan of a prompt, which is decided but for the replicas, as the feature changes it.

        Args:
            options: the request's, and the server's where it gives none.
        """
        return plan

    def check(self, plan: StarPlan, params: Any) -> None:
        """Refuse a request's SamplingParams that can't be used with its prompt's plan (raises OptionError)."""

    def lora(self, plan: StarPlan, named: Any) -> Any:
        """The LoRA adapter (LoRARequest) with which a prompt runs; None: the model alone.

        Args:
            named: the request's own, or that of an earlier part; None: none.
        """
        return named

    def outputs(self, request: FrontRequest, facts: EngineFacts) -> AsyncGenerator[Any, None] | None:
        """The outputs of a request that the feature runs in its own way; None: it does not. The first part that does.

        Args:
            facts: what is known of the engine now.

        Raises:
            OptionError: the request can't run.
        """
        return None

    def waiting(self) -> Collection[str]:
        """The ids of requests that the feature runs, and which the engine may not know yet, or any more."""
        return ()

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests, where the feature runs them and the engine does not know them. vLLM ends the others."""
