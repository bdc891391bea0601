"""A request's star options, from what the client sent to the numbers everything downstream reads."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.utils import length_from_prompt_token_ids_or_embeds

from engine_ext.activation import ENTRY, parse_config
from engine_ext.kv_room import enough_replicas
from engine_ext.metrics import front_metrics
from engine_ext.refusals import fleet, refuse_overlap, star_refusals
from scheduler.options import FIELD_OF, OptionError, flat_name, is_star_key, parse_options
from scheduler.plan import PLAN_KEY, StarPlan, make_plan
from scheduler.segments import SEGMENT_TOKEN, TokenLimits, align
from scheduler.share import SHARE_KEY, Part, Share, default_shards

# The plans of the HTTP request being handled: filled here, sent by the PlanHeader middleware.
# By prompt object: /v1/responses passes each prompt through check_early twice.
response_plans: ContextVar[dict[int, dict[str, Any]] | None] = ContextVar("starling_response_plans", default=None)

# The ids of the engine requests that the HTTP request being handled made: filled here, read by HttpProgress.
response_requests: ContextVar[list[str] | None] = ContextVar("starling_response_requests", default=None)

HOW_TO_ACTIVATE = (
    f"Starling is not activated on this server: start it with `starling serve`, or give vLLM "
    f"--additional-config '{{\"{ENTRY}\": {{}}}}'"
)


@dataclass(frozen=True)
class PlannedPrompt:
    """How one prompt is prefilled.

    Attributes:
        plan: None: dense.
        num_tokens: of the prompt that the engine gets.
        token_ids: that prompt; None where it was not given as tokens alone.
        padding_tokens: how many of them were added, to have its segments start where star blocks do.
    """

    plan: StarPlan | None
    num_tokens: int
    token_ids: list[int] | None = None
    padding_tokens: int = 0


class StarRequests:
    """Resolves the star options of one engine's requests."""

    def __init__(self, vllm_config: Any, tokenizer: Any = None) -> None:
        self.config = parse_config(vllm_config.additional_config)
        self.refusals = star_refusals(vllm_config) if self.config else [HOW_TO_ACTIVATE]
        self.fleet = fleet(vllm_config)
        self.vllm_config = vllm_config
        self.tokenizer = tokenizer

    @property
    def page(self) -> int | None:
        """Tokens of a full-attention KV page, known once the engine core has started."""
        return self.vllm_config.cache_config.effective_attention_block_size

    @cached_property
    def token_limits(self) -> TokenLimits:
        """For segments; a prompt leaves room for one token of output."""
        model = self.vllm_config.model_config
        return TokenLimits(model.max_model_len - 1, model.get_vocab_size(), lambda: self.white_space)

    @cached_property
    def white_space(self) -> int | None:
        """The token of a space, else of a line break; None where the model's tokenizer has neither, or is not known."""
        for text in (" ", "\n") if self.tokenizer is not None else ():
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if ids and self.tokenizer.decode(ids[-1:]) == text:
                return int(ids[-1])
        return None

    @property
    def pages(self) -> int:
        """KV pages of a replica, known once the engine core has started. vLLM adds up those of all, null pages too."""
        return (self.vllm_config.cache_config.num_gpu_blocks or 0) // self.fleet.size - 1

    def plan(
        self, extra_args: Mapping[str, Any] | None, num_tokens: int, token_ids: list[int] | None = None
    ) -> PlannedPrompt:
        """What a request's prompt comes to.

        Args:
            num_tokens: of the prompt that the client gave.
            token_ids: these, where there is nothing else in it: neither images nor embeddings.

        Raises:
            VLLMValidationError: the request's options can't be used; HTTP 400, INVALID_ARGUMENT.
        """
        try:
            planned = self._plan(extra_args or {}, num_tokens, token_ids)
            self._check_room(planned)
        except OptionError as error:
            # A key of the client's own making would be a label of its own making: count it as one.
            front_metrics().rejections.labels(error.name if error.name in FIELD_OF else "unknown").inc()
            raise VLLMValidationError(str(error), parameter=error.name) from None
        return planned

    def _plan(self, extra_args: Mapping[str, Any], num_tokens: int, token_ids: list[int] | None) -> PlannedPrompt:
        given = {key: value for key, value in extra_args.items() if is_star_key(key)}
        if self.config is None:
            if given:
                name, value = next(iter(given.items()))
                raise OptionError(name, value, HOW_TO_ACTIVATE, f"no star options without {ENTRY}")
            return PlannedPrompt(None, num_tokens, token_ids)
        request = parse_options(given, flat=True) if given else None
        mode = self.config.star.mode if request is None or "mode" not in request.model_fields_set else request.mode
        if mode != "off" and self.refusals:
            raise OptionError("star", mode, "; ".join(self.refusals), "off")
        if mode != "off" and self.page is None:
            raise OptionError("star", mode, "the full-attention layers have no one KV page size", "off")
        if mode != "off" and request is not None:
            refuse_overlap(self.vllm_config, request.overlap_size)
        page, defaults, had = self.page or 1, self.config.star, num_tokens
        if token_ids is not None:
            token_ids, request = align(token_ids, defaults, request, page, self.token_limits)
            num_tokens = len(token_ids)
        elif SEGMENT_TOKEN in given:
            reason = "the prompt has images or embeddings, which can't be moved"
            raise OptionError(SEGMENT_TOKEN, given[SEGMENT_TOKEN], reason, "a prompt of tokens alone, or no mark")
        plan = make_plan(num_tokens, defaults, request, page, self.fleet)
        if plan is not None and plan.shards:
            asked = defaults.replicas
            if request is not None and "replicas" in request.model_fields_set:
                asked = request.replicas
            plan = enough_replicas(plan, page, self.pages, self.fleet.size if asked == "auto" else asked)
        return PlannedPrompt(plan, num_tokens, token_ids, num_tokens - had)

    def _check_room(self, planned: PlannedPrompt) -> None:
        """Refuse what fits in no replica's memory, where max_model_len is more than that (raises OptionError)."""
        over_shards = planned.plan is not None and planned.plan.shards
        if default_shards(self.vllm_config) == 1 or over_shards or self.page is None:
            return
        room = self.pages * self.page
        if planned.num_tokens >= room:
            reason = (
                f"the prompt of {planned.num_tokens} tokens runs on one replica, whose KV memory holds {room}, output "
                "included"
            )
            raise OptionError(flat_name("shards"), "off", reason, "a shorter prompt, or a star prompt with on")

    def describe(self, planned: PlannedPrompt) -> dict[str, Any]:
        """What a client is told of its plan."""
        told = describe(planned.plan, planned.num_tokens, self.vllm_config.model_config.hf_text_config)
        return told | {"padding_tokens": planned.padding_tokens}


def tokens_alone(engine_input: Mapping[str, Any]) -> list[int] | None:
    """The tokens of a prompt that has nothing else: neither images nor embeddings; None where it has."""
    token_ids: list[int] = engine_input["prompt_token_ids"]
    alone = engine_input.get("type", "token") == "token" and not engine_input.get("multi_modal_data")
    return token_ids if alone else None


def star_requests(input_processor: Any) -> StarRequests:
    """The resolver of an engine, made once and kept on its input processor."""
    resolver = getattr(input_processor, "starling", None)
    if resolver is None:
        resolver = input_processor.starling = StarRequests(
            input_processor.vllm_config, getattr(input_processor, "tokenizer", None)
        )
    return resolver


def resolve_request(input_processor: Any, request: Any) -> None:
    """Replace a processed request's star options by its plan, in the request's own sampling parameters."""
    params = request.sampling_params
    if params is None:
        return
    resolver = star_requests(input_processor)
    share = (params.extra_args or {}).get(SHARE_KEY)
    if share is not None and not isinstance(share, Share):
        reason = "it is how replicas tell one another of a prompt they share"
        raise VLLMValidationError(str(OptionError(SHARE_KEY, share, reason, "nothing")), parameter=SHARE_KEY)
    if share is not None and isinstance(share.task, Part):  # ours, with the plan of the prompt it is a part of
        plan_args = {} if share.plan is None else {PLAN_KEY: share.plan}
        params.extra_args = plan_args | {SHARE_KEY: share.to_wire()}
        return
    num_tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
    alone = request.prompt_embeds is None and not request.mm_features
    planned = resolver.plan(params.extra_args, num_tokens, request.prompt_token_ids if alone else None)
    if resolver.config is None:
        return
    plan = planned.plan
    if planned.padding_tokens:
        _refuse_positions(params)
        request.prompt_token_ids = planned.token_ids
    if plan is not None and request.resumable:
        reason = "a streaming-input session has no final prompt to plan for"
        raise VLLMValidationError(str(OptionError("star", "on", reason, "off")), parameter="star")
    if params.extra_args or plan is not None:
        rest = {key: value for key, value in (params.extra_args or {}).items() if not is_star_key(key)}
        params.extra_args = rest if plan is None else rest | {PLAN_KEY: plan.to_wire()}
        if share is not None:
            params.extra_args[SHARE_KEY] = share.to_wire()
    front_metrics().requests.labels("dense" if plan is None else "star").inc()


def _refuse_positions(params: Any) -> None:
    """Refuse what counts the prompt's tokens as the client does, where the engine gets more of them."""
    rows, start = params.prompt_logprob_token_ids, params.routed_experts_prompt_start
    for name, value, given in (
        ("prompt_logprob_token_ids", rows and f"{len(rows)} rows", rows is not None),
        ("routed_experts_prompt_start", start, start > 0),
    ):
        if given:
            reason = "the prompt has more tokens with its segments at star blocks' borders"
            error = OptionError(name, value, reason, f"none, or no {SEGMENT_TOKEN}")
            raise VLLMValidationError(str(error), parameter=name)


def check_early(input_processor: Any, engine_input: Any, params: Any, request_id: str | None = None) -> None:
    """Refuse bad options, and note plan and request id, while the response can still be an error with headers."""
    if input_processor is None or not isinstance(engine_input, Mapping):
        return
    resolver = star_requests(input_processor)
    extra_args = getattr(params, "extra_args", None)
    if resolver.config is None and not extra_args:
        return
    token_ids = engine_input.get("prompt_token_ids")
    if token_ids is None:
        return
    planned = resolver.plan(extra_args, len(token_ids), tokens_alone(engine_input))
    told = response_plans.get()
    if told is not None and resolver.config is not None:
        told[id(engine_input)] = resolver.describe(planned)
    made = response_requests.get()
    if made is not None and request_id is not None:
        made.append(request_id)


def describe(plan: StarPlan | None, num_prompt_tokens: int, model: Any = None) -> dict[str, Any]:
    """What a client is told: the plan, or that its prompt runs dense.

    Args:
        model: the text model's configuration; where its ``prompt_keys`` counts keys in its own way, so is told.
    """
    dense = {"attention": "dense", "prompt_tokens": num_prompt_tokens}
    told = dense if plan is None else {"attention": "star"} | plan.summary()
    count = getattr(model, "prompt_keys", None)
    return told | count(plan, num_prompt_tokens) if count else told


def refuse_beam_search(http_request: Any) -> None:
    """Beam search drops per-request options and plans each beam anew: refuse star options with it."""
    for key, value in (http_request.vllm_xargs or {}).items():
        if is_star_key(key):
            reason = "beam search restarts every beam as a new prompt, so it has no one plan"
            raise VLLMValidationError(str(OptionError(key, value, reason, "use_beam_search=false")), parameter=key)
