"""Preparation of a request's prompt in a front: its plan is decided, and put into the engine's input."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.utils import length_from_prompt_token_ids_or_embeds

from starling.config.parsing import OptionError
from starling.config.star import STAR_RETENTION, flat_name, is_star_key, parse_options
from starling.engine_ext.front.bounds import REQUEST_ID, check_params, check_prompt_logprobs, check_transfer_params
from starling.engine_ext.front.cache_salt import salted
from starling.engine_ext.front.call import current_call
from starling.engine_ext.front.misplaced import refuse_at_top_level, refuse_misspelled
from starling.engine_ext.front.observability import front_metrics
from starling.engine_ext.front.planning import PromptPlanner, rejection
from starling.scheduler.planning.decide import PLANNED, Decision, decision_of
from starling.scheduler.planning.facts import PromptFacts
from starling.scheduler.planning.plan import StarPlan, describe
from starling.scheduler.planning.request_metadata import KEY, NO_METADATA, RequestMetadata
from starling.vllm_compat.front import IS_BEAM

SESSION = "the prompt of a streaming-input session comes in pieces, so there is no whole prompt to plan"
BEAM = "beam search makes a new prompt of each beam and token, whose star blocks would be computed again and again"

KNOWN_SEGMENTS = "starling_segments"
"""Key of an engine input that holds its KnownSegments, if its front knows them."""


def shown_plan(engine_input: Any) -> dict[str, Any] | None:
    """Return the plan of an engine input as a response shows it, or None if it was not planned."""
    decision = decision_of(engine_input)
    return None if decision is None else decision.shown


class RequestPlanner(PromptPlanner):
    """Planner of one engine's requests: each prompt is planned once, by the first front that sees its tokens."""

    def prepare(self, engine_input: Any, params: Any, request_id: str | None = None, *, has_lora: bool = False) -> Any:
        """Plan an engine input, and note plan and request id, while the response can still be an error with headers.

        Args:
            engine_input: the input that vLLM's renderer made.
            params: the request's sampling parameters, or those of a pooling request.
            request_id: the id that the engine is about to get, or None if there is none yet.
            has_lora: whether the request names a LoRA adapter.

        Returns:
            The engine input with its Decision and, if there is a request id, its salt. It has no decision if its tokens
                are not known yet.

        Raises:
            VLLMValidationError: the request's options or transfer parameters can't be used, a parameter is above its
                bound, or the request lacks the salt that the server requires.
        """
        extra_args = getattr(params, "extra_args", None)
        given_metadata(extra_args)
        check_transfer_params(extra_args)
        check_params(params)
        with_salt = self.with_salt(engine_input)
        if request_id is not None:  # else the same input comes again, with an id
            engine_input = with_salt
        reason = why_dense(engine_input)
        if reason == SESSION:
            self.plan(extra_args, PromptFacts(0, dense_only=reason))
        if not isinstance(engine_input, Mapping) or (self.config is None and not extra_args):
            return engine_input
        token_ids = engine_input.get("prompt_token_ids")
        if token_ids is None:
            return engine_input
        call = current_call.get()
        check_prompt_logprobs(len(token_ids), params)
        if PLANNED not in engine_input:
            began = time.time_ns()
            decision = self.plan(extra_args, prompt_facts(engine_input, reason, has_lora))
            shown = self.describe(decision)
            decision = replace(decision, shown=shown, planning=(began, time.time_ns()))
            engine_input = {**engine_input, PLANNED: decision}
            if call is not None and self.config is not None:
                call.add_plan(shown)
        if call is not None and request_id is not None:
            call.add_request(request_id, 0 if engine_input.get(IS_BEAM) else getattr(params, "n", 1))
        return engine_input

    def with_salt(self, engine_input: Any) -> Any:
        """Return an engine input with the salt that the server's option `cache_salt` gives it.

        Raises:
            VLLMValidationError: the server requires a salt or an API key, and the request has none.
        """
        return engine_input if self.config is None else salted(self.config.cache_salt, engine_input)

    def resolve(self, request: Any, prompt: Any) -> None:
        """Replace the star options of a processed request by its metadata, in the request's own sampling parameters.

        If the plan has an adapter of the server's, the request gets that adapter.

        Args:
            request: the processed request (vLLM's EngineCoreRequest).
            prompt: the prompt that vLLM made the request from, with its Decision if a front has planned it.

        Raises:
            VLLMValidationError: the request's options can't be used.
        """
        params = request.sampling_params
        metadata = given_metadata(params.extra_args)
        if metadata.part is not None:  # made by split prefill, with the plan of the whole prompt
            params.extra_args = {KEY: metadata.to_wire()}
            return
        decision = decision_of(prompt)
        num_tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        # vLLM renders a prompt of Python's that no renderer has seen here: it may truncate it, or expand images.
        if decision is None or decision.num_tokens != num_tokens:
            alone = request.prompt_embeds is None and not request.mm_features
            reason = SESSION if request.resumable else why_dense(prompt)
            has_lora = request.lora_request is not None
            token_ids = request.prompt_token_ids if alone else None
            facts = PromptFacts(num_tokens, token_ids, dense_only=reason, has_lora=has_lora)
            decision = self.plan(params.extra_args, facts)
        if self.config is None:
            return
        decision = self.hinted(decision, request)
        if decision.plan is not None and decision.plan.documents:
            check_with_documents(params)
        request.lora_request = self.lora_of(decision.plan, request.lora_request)
        metadata = replace(
            metadata,
            plan=decision.plan,
            why=decision.why,
            keys=self.model_keys(decision),
            retention=decision.retention,
        )
        rest = {key: value for key, value in (params.extra_args or {}).items() if not is_star_key(key)}
        params.extra_args = rest | {KEY: metadata.to_wire()}
        if not request.resumable:  # a session's last piece, without input, is the one that counts
            front_metrics().requests.labels("dense" if decision.plan is None else "star").inc()

    def hinted(self, decision: Decision, request: Any) -> Decision:
        """Return a decision that follows the retention hints of vLLM's own request (raises VLLMValidationError)."""
        retention = self.features.get("retention")
        try:
            return decision if retention is None else retention.hinted(decision, request, self.facts)
        except OptionError as error:
            raise rejection(error) from None

    def lora_of(self, plan: StarPlan | None, named: Any) -> Any:
        """Return the LoRA adapter (LoRARequest) of a prompt: the server's, if its plan has it, or ``named``.

        Args:
            named: the request's own adapter, or None if it names none.
        """
        adapter = self.features.get("adapter")
        return named if plan is None or adapter is None else adapter.lora(plan, named)


def check_with_documents(params: Any) -> None:
    """Refuse SamplingParams that count the client's prompt tokens, because the engine's prompt has padding tokens too.

    Raises:
        VLLMValidationError: the parameters have one of these fields.
    """
    rows, start = params.prompt_logprob_token_ids, params.routed_experts_prompt_start
    for name, value, given in (
        ("prompt_logprob_token_ids", rows and f"{len(rows)} rows", rows is not None),
        ("routed_experts_prompt_start", start, start > 0),
    ):
        if given:
            reason = "with each document on a KV page the engine's prompt has more tokens"
            error = OptionError(name, value, reason, f"none, or {flat_name('segments')}=off")
            raise VLLMValidationError(str(error), parameter=name)


def plan_of_request(request: Any) -> dict[str, Any] | None:
    """Return the plan of a processed request as its RequestOutput shows it, or None for a pooling request.

    Samples of one prompt (`n` > 1) share their parameters, and an engine in this process has already decoded them when
    the second sample comes.
    """
    params = request.sampling_params
    found = (params.extra_args or {}).get(KEY) if params is not None else None
    if found is None:
        return None
    metadata = found if isinstance(found, RequestMetadata) else RequestMetadata.from_wire(found)
    num_tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
    return describe(metadata.plan, num_tokens, why=metadata.why) | (metadata.keys or {})


def given_metadata(extra_args: Mapping[str, Any] | None) -> RequestMetadata:
    """Return the metadata that split prefill gave a request; empty for requests of clients.

    Raises:
        VLLMValidationError: a client uses the key.
    """
    metadata = (extra_args or {}).get(KEY, NO_METADATA)
    if not isinstance(metadata, RequestMetadata):
        error = OptionError(KEY, metadata, "this key is reserved for Starling", "leave it out")
        raise VLLMValidationError(str(error), parameter=KEY)
    return metadata


def why_dense(prompt: Any) -> str | None:
    """Return why a prompt of AsyncLLM.generate has no star plan, or None if it can have one."""
    if isinstance(prompt, AsyncGenerator):
        return SESSION
    return BEAM if isinstance(prompt, Mapping) and IS_BEAM in prompt else None


def prompt_facts(engine_input: Mapping[str, Any], dense_only: str | None = None, has_lora: bool = False) -> PromptFacts:
    """Return the facts of a rendered prompt."""
    token_ids: list[int] = engine_input["prompt_token_ids"]
    alone = engine_input.get("type", "token") == "token" and not engine_input.get("multi_modal_data")
    return PromptFacts(
        len(token_ids), token_ids if alone else None, engine_input.get(KNOWN_SEGMENTS), dense_only, has_lora
    )


def check_unknown(fields: Mapping[str, Any]) -> None:
    """Refuse star options among the fields of a request's JSON that vLLM ignores (raises VLLMValidationError)."""
    try:
        refuse_at_top_level(fields)
        if current_call.get() is not None:  # a server for which Starling is activated
            refuse_misspelled(fields)
    except OptionError as error:
        raise rejection(error) from None


def check_openai_request(http_request: Any) -> None:
    """Refuse star options of an OpenAI request that would have no effect, and an id above its bound.

    vLLM ignores the options as fields of a request, and in the `vllm_xargs` of a beam search.

    Raises:
        VLLMValidationError: the request has an option without effect, or its id is too long.
    """
    check_unknown(http_request.model_extra or {})
    REQUEST_ID.check(len(getattr(http_request, "request_id", None) or ""))
    if not getattr(http_request, "use_beam_search", False):
        return
    given = {key: value for key, value in (http_request.vllm_xargs or {}).items() if is_star_key(key)}
    try:
        options = parse_options(given)
        if options.retention is not None:
            reason = "beam search makes a new prompt of each beam and token, and vLLM hands no option on"
            raise OptionError(STAR_RETENTION, given[STAR_RETENTION], reason, f"no {STAR_RETENTION}")
        if given and (options.mode == "on" or "mode" not in options.model_fields_set):  # sizes alone ask for star too
            name = "star" if "star" in given else next(iter(given))
            raise OptionError(name, given[name], BEAM, "star=off or star=auto")
    except OptionError as error:
        raise rejection(error) from None


def begin_beam_search() -> None:
    """Let the current call show one more plan: beam search makes a new prompt of each beam and token."""
    call = current_call.get()
    if call is not None:
        call.max_plans = (call.max_plans or 0) + 1
