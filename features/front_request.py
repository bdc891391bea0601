"""A request as a front gives it to its engine, and the output of one that the engine does not get."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput

from starling.scheduler.star.decide import Decision

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
