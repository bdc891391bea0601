"""A request that a front gives to its engine, and the output of one that the engine does not get."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput

from starling.scheduler.planning.decide import Decision

TRACE_HEADERS = "trace_headers"
"""Keyword of AsyncLLM.generate for the headers that name the parent of a trace span."""


@dataclass(frozen=True)
class FrontRequest:
    """A request that a front is about to give to its engine.

    Attributes:
        engine: the AsyncLLM.
        generate: vLLM's own AsyncLLM.generate of this engine.
        prompt: the engine input.
        params: vLLM's SamplingParams or PoolingParams.
        request_id, keywords: arguments of AsyncLLM.generate.
        decision: how the prompt is prefilled, or None if it was not planned because its tokens are not known.
        lora: the LoRA adapter (LoRARequest) that the request runs with, or None.
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
        """Yield the request's outputs from vLLM's engine."""
        return self.generate(self.prompt, self.params, self.request_id, **self.keywords)


def empty_output(
    request_id: str, token_ids: Sequence[int], num_choices: int, finish_reason: str = "abort"
) -> RequestOutput:
    """Return the last output of a request that the engine does not get."""
    choices = [
        CompletionOutput(index, "", [], cumulative_logprob=None, logprobs=[], finish_reason=finish_reason)
        for index in range(num_choices)
    ]
    return RequestOutput(request_id, None, list(token_ids), None, choices, finished=True, num_cached_tokens=0)
