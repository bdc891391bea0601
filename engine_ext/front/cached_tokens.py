"""How many tokens of a request's prompt each replica has cached: asked in place of running the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError

from starling.engine_ext.call import Call
from starling.engine_ext.front.state import front_state
from starling.engine_ext.requests import PLANNED, SHOWN
from starling.scheduler.core_rpc import CACHED_TOKENS
from starling.scheduler.star.request_metadata import RequestMetadata
from starling.vllm_compat.front import call_engine_core, num_engine_cores


class LookedUp(VLLMValidationError):
    """In place of a request's outputs: the call has the answer."""


async def look_up(engine: Any, prompt: Any, keywords: Mapping[str, Any], call: Call) -> AsyncGenerator[Any, None]:
    """Give a call its answer; no outputs.

    Args:
        engine: an AsyncLLM.
        prompt: the engine input.
        keywords: of AsyncLLM.generate.

    Raises:
        LookedUp: always, once the call has its answer.
        VLLMValidationError: prompts of this kind are not looked up.
        EngineDeadError, RetryableRequestError: a replica does not answer.
    """
    planned = prompt.get(PLANNED) if isinstance(prompt, Mapping) else None
    if planned is None or planned.token_ids is None:
        raise VLLMValidationError("Only prompts of text are looked up.", parameter="prompt")
    lora = keywords.get("lora_request")
    adapter = None if lora is None else [lora.lora_name, lora.lora_int_id, lora.lora_path]
    question = (planned.token_ids, RequestMetadata(planned.plan).to_wire(), prompt.get("cache_salt"), adapter)
    async with front_state(engine).lookups:
        ranks = range(num_engine_cores(engine))
        found = await asyncio.gather(*(call_engine_core(engine, rank, CACHED_TOKENS, *question) for rank in ranks))
    if "refusal" in found[0]:
        raise VLLMValidationError(f"No prompt is looked up: {found[0]['refusal']}.", parameter="prompt")
    call.cached = {"plan": prompt[SHOWN], "replicas": found}
    raise LookedUp("the prompt was looked up, and does not run")
    yield  # makes this a generator
