"""Look-up of the tokens of a request's prompt that each replica has cached, in place of running the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput

from starling.attention_backends.star.refusals import has_library
from starling.config.entry import config_of
from starling.engine_ext.front.call import Call, this_call
from starling.engine_ext.front.front_state import front_state
from starling.features.adapter.lora import adapter_fields
from starling.features.front_request import empty_output
from starling.scheduler.cache_state import CACHED_TOKENS
from starling.scheduler.planning.decide import decision_of
from starling.scheduler.planning.request_metadata import RequestMetadata
from starling.vllm_compat.admission_limits import admit, withdraw
from starling.vllm_compat.front import call_engine_core, num_engine_cores


def prepare_look_up(http_request: Any) -> None:
    """Prepare a request of a call that only looks up to give one answer, even if it asks for a stream or an echo.

    Raises:
        VLLMValidationError: the request runs in the background, or is a beam search, which makes a new prompt of each
            beam and token.
    """
    if not this_call().only_looks_up:
        return
    if getattr(http_request, "background", None):
        raise VLLMValidationError("A response in the background is not looked up.", parameter="background")
    if getattr(http_request, "use_beam_search", False):
        raise VLLMValidationError("A beam search is not looked up.", parameter="use_beam_search")
    for name in ("stream", "echo"):  # an answer without tokens has no log-probabilities to echo
        if getattr(http_request, name, None):
            setattr(http_request, name, False)


def look_up(
    engine: Any, prompt: Any, request_id: str, keywords: Mapping[str, Any], call: Call
) -> AsyncGenerator[RequestOutput, None]:
    """Return the outputs of a request that is looked up: one output without tokens, once the call has its answer.

    Requests are refused here, before a response begins.

    Args:
        engine: an AsyncLLM.
        prompt: the engine input.
        request_id, keywords: as for AsyncLLM.generate.
        call: the call that gets the answer.

    Raises:
        VLLMValidationError: prompts of this kind can't be looked up, or the request has several prompts.
    """
    planned = decision_of(prompt)
    if planned is None or planned.token_ids is None:
        raise VLLMValidationError("Only prompts of text are looked up.", parameter="prompt")
    if len(call.plans) > 1:
        raise VLLMValidationError("One prompt is looked up, and the request has more.", parameter="prompt")
    lora = front_state(engine).planner.lora_of(planned.plan, keywords.get("lora_request"))
    metadata = RequestMetadata(planned.plan).to_wire()
    question = (planned.token_ids, metadata, prompt.get("cache_salt"), adapter_fields(lora))
    return _ask(engine, question, planned.shown, call, request_id)


async def _ask(
    engine: Any, question: tuple[Any, ...], plan: Any, call: Call, request_id: str
) -> AsyncGenerator[RequestOutput, None]:
    """Store the replicas' answer in the call, which counts towards the limits until then (--max-num-queued-reqs).

    Raises:
        QueueOverflowError, MaxQueuedTokensError: the server's limits are reached.
        VLLMValidationError: the engine can't look up prompts.
        EngineDeadError, RetryableRequestError: a replica does not answer.
    """
    admission = admit(engine, request_id, 1, len(question[0]))
    try:
        async with front_state(engine).lookups:
            ranks = range(num_engine_cores(engine))
            found = await asyncio.gather(*(call_engine_core(engine, rank, CACHED_TOKENS, *question) for rank in ranks))
    finally:
        withdraw(engine, admission)
    if "refusal" in found[0]:
        raise VLLMValidationError(f"No prompt is looked up: {found[0]['refusal']}.", parameter="prompt")
    config = config_of(engine.vllm_config)
    own = {} if config is None else {"star_segments": config.star.segments, "library": has_library(engine.vllm_config)}
    call.cached = {"plan": plan, "replicas": found} | own
    yield empty_output(request_id, question[0], 1, "stop")
