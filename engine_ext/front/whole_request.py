"""A request whose parts were prefilled before: its parameters; and the output of one that the engine does not get."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams

from starling.scheduler.star.request_metadata import KEY, PageFetch, RemoteShards, RequestMetadata

Task = PageFetch | RemoteShards


def empty_output(
    request_id: str, token_ids: Sequence[int], num_choices: int, finish_reason: str = "abort"
) -> RequestOutput:
    """The last output of a request that the engine does not get."""
    choices = [
        CompletionOutput(index, "", [], cumulative_logprob=None, logprobs=[], finish_reason=finish_reason)
        for index in range(num_choices)
    ]
    return RequestOutput(request_id, None, list(token_ids), None, choices, finished=True, num_cached_tokens=0)


def with_task(params: SamplingParams, task: Task | None) -> SamplingParams:
    """The whole request's parameters, with what it does with the other replicas' pages."""
    if task is None:
        return params
    metadata = RequestMetadata(fetch=task) if isinstance(task, PageFetch) else RequestMetadata(remote=task)
    own = params.clone()
    own.extra_args = (params.extra_args or {}) | {KEY: metadata}
    return own
