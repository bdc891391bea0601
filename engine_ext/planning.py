"""The plan of a prompt: from the star options of a server and of a request to how the prompt is prefilled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from starling.engine_ext.activation import ENTRY, parse_config
from starling.engine_ext.dense_prompts import refuse_star
from starling.engine_ext.metrics import front_metrics
from starling.engine_ext.refusals import (
    refuse_block_positions,
    refuse_overlap,
    replica_set,
    star_refusals,
    takes_overlap,
)
from starling.scheduler.star.block_layout import POSITIONS, TooMuchPadding, plan_blocks
from starling.scheduler.star.counts import describe
from starling.scheduler.star.known_segments import TOO_LONG, KnownSegments, with_known_segments
from starling.scheduler.star.kv_demand import with_enough_replicas
from starling.scheduler.star.make_plan import ReplicaSet, make_plan
from starling.scheduler.star.options import FIELD_OF, StarOptions, flat_name, is_star_key, merge, parse_options
from starling.scheduler.star.parsing import OptionError
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.request_metadata import default_num_shards
from starling.scheduler.star.segments import SEGMENT_TOKEN, SEGMENTS, TokenLimits, align, refuse_many_offsets

logger = init_logger("vllm.starling")

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
        token_ids: that prompt; None where the client's prompt has images or embeddings.
        padding_tokens: how many of the tokens were added, to move segments to star blocks' borders.
        segments_refusal: why the prompt has no segments although the server's default asks for them; None: it has, or
            the default does not ask.
    """

    plan: StarPlan | None
    num_tokens: int
    token_ids: list[int] | None = None
    padding_tokens: int = 0
    segments_refusal: str | None = None


def usable_defaults(vllm_config: Any, star: StarOptions, refusals: list[str], replicas: ReplicaSet) -> StarOptions:
    """The server's star options without those that its engines, as they found when they started, can't follow.

    What the configuration alone excludes is refused before the start (activation.py).
    """
    usable: dict[str, str | int] = {}
    if refusals:
        usable |= {"mode": "off"}
    if replicas.split_refusal:
        usable |= {"replicas": "auto", "shards": "off"}
    if not takes_overlap(vllm_config):
        usable |= {"overlap_size": 0}
    return star.model_copy(update=usable)


class PromptPlanner:
    """Plans the prompts of one engine."""

    def __init__(self, vllm_config: Any, tokenizer: Any = None) -> None:
        self.config = parse_config(vllm_config.additional_config)
        self.refusals = star_refusals(vllm_config) if self.config else [HOW_TO_ACTIVATE]
        self.replicas = replica_set(vllm_config)
        self.defaults = (
            usable_defaults(vllm_config, self.config.star, self.refusals, self.replicas) if self.config else None
        )
        self.vllm_config = vllm_config
        self.tokenizer = tokenizer
        self.num_peers: Callable[[], int] | None = None  # how many servers there are now to split prompts with

    @property
    def replicas_now(self) -> ReplicaSet:
        """The replicas that a prompt may be split over now."""
        return self.replicas if self.num_peers is None else replace(self.replicas, present=1 + self.num_peers())

    @property
    def page_size(self) -> int | None:
        """Tokens of a full-attention KV page, known once the engine core has started."""
        return self.vllm_config.cache_config.effective_attention_block_size

    @property
    def num_pages(self) -> int:
        """KV pages of a replica, known once the engine core has started. vLLM adds up all replicas' and null pages."""
        engines = self.vllm_config.parallel_config.data_parallel_size
        return (self.vllm_config.cache_config.num_gpu_blocks or 0) // engines - 1

    @cached_property
    def token_limits(self) -> TokenLimits:
        """For segments; a prompt leaves room for one token of output."""
        model = self.vllm_config.model_config
        return TokenLimits(model.max_model_len - 1, model.get_vocab_size(), lambda: self.white_space)

    @cached_property
    def white_space(self) -> int | None:
        """The token of a space, else of a line break; None where the tokenizer has neither, or there is none."""
        for text in (" ", "\n") if self.tokenizer is not None else ():
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if ids and self.tokenizer.decode(ids[-1:]) == text:
                return int(ids[-1])
        return None

    def plan(
        self,
        extra_args: Mapping[str, Any] | None,
        num_tokens: int,
        token_ids: list[int] | None = None,
        dense_reason: str | None = None,
        segments: KnownSegments | None = None,
    ) -> PlannedPrompt:
        """The plan of a request's prompt.

        Args:
            extra_args: of the request's sampling parameters.
            num_tokens: of the prompt that the client gave.
            token_ids: these tokens, where the prompt has neither images nor embeddings.
            dense_reason: why the prompt can't have a star plan; None: it can.
            segments: what the front knows of the prompt's segments; None: nothing.

        Raises:
            VLLMValidationError: the request's options can't be used; HTTP 400, INVALID_ARGUMENT.
        """
        try:
            planned = self._plan(extra_args or {}, num_tokens, token_ids, dense_reason, segments)
            self._check_memory(planned)
        except OptionError as error:
            raise rejection(error) from None
        logger.debug("planned a prompt of %d tokens: %s", planned.num_tokens, planned.plan or "dense")
        return planned

    def _plan(
        self,
        extra_args: Mapping[str, Any],
        num_tokens: int,
        token_ids: list[int] | None,
        dense_reason: str | None,
        segments: KnownSegments | None,
    ) -> PlannedPrompt:
        given = {key: value for key, value in extra_args.items() if is_star_key(key)}
        if self.config is None or self.defaults is None:
            if given:
                name, value = next(iter(given.items()))
                raise OptionError(name, value, HOW_TO_ACTIVATE, f"no star options without {ENTRY}")
            return PlannedPrompt(None, num_tokens, token_ids)
        refuse_many_offsets(given.get(SEGMENTS), num_tokens)
        request = parse_options(given, flat=True) if given else None
        if request is None:
            mode = self.defaults.mode
        else:
            mode = request.mode if "mode" in request.model_fields_set else self.config.star.mode
        if mode != "off" and self.refusals:
            raise OptionError("star", mode, "; ".join(self.refusals), "off")
        if mode != "off" and self.page_size is None:
            raise OptionError("star", mode, "the full-attention layers have no one KV page size", "off")
        if dense_reason is not None:
            refuse_star(given, mode, dense_reason)
            return PlannedPrompt(None, num_tokens, token_ids)
        if mode != "off" and request is not None:
            refuse_overlap(self.vllm_config, request.overlap_size)
        page_size, client_tokens = self.page_size or 1, num_tokens
        own, (defaults, request, refusal) = request, with_known_segments(self.defaults, request, segments, num_tokens)
        if mode != "off" and merge(defaults, request).positions == "block":
            planned = self._plan_blocks(defaults, request, given, num_tokens, token_ids, page_size)
            if planned is not None:
                return replace(planned, segments_refusal=refusal)
            if refusal is None and token_ids is not None and merge(defaults, request).segments is not None:
                refusal = TOO_LONG
            request = own
            defaults = defaults.model_copy(update={"segment_token": None, "segments": None, "padding_token": None})
        if token_ids is not None:
            token_ids, request = align(token_ids, defaults, request, page_size, self.token_limits)
            num_tokens = len(token_ids)
        elif named := [name for name in (SEGMENT_TOKEN, SEGMENTS) if given.get(name) is not None]:
            name = named[0]
            reason = "the prompt has images or embeddings, which can't be moved"
            raise OptionError(name, given[name], reason, f"a text-only prompt, or no {name}")
        plan = self._with_room(make_plan(num_tokens, defaults, request, page_size, self.replicas_now), request)
        return PlannedPrompt(plan, num_tokens, token_ids, num_tokens - client_tokens, refusal)

    def _with_room(self, plan: StarPlan | None, request: StarOptions | None) -> StarPlan | None:
        """A plan, with as many replicas as its KV needs where that stays on them (raises OptionError)."""
        if plan is None or not plan.shards:
            return plan
        assert self.defaults is not None
        wanted = merge(self.defaults, request).replicas
        limit = self.replicas.size if wanted == "auto" else wanted
        return with_enough_replicas(plan, self.page_size or 1, self.num_pages, limit)

    def _plan_blocks(
        self,
        defaults: StarOptions,
        request: StarOptions | None,
        given: Mapping[str, Any],
        num_tokens: int,
        token_ids: list[int] | None,
        page_size: int,
    ) -> PlannedPrompt | None:
        """The plan of a prompt whose blocks have positions of their own.

        Returns:
            None where only the server's default asks for them, and the prompt can't have them.

        Raises:
            OptionError: the request's options can't be used.
        """
        refuse_block_positions(self.vllm_config, "block")
        by_default = not {POSITIONS, SEGMENT_TOKEN, SEGMENTS} & given.keys()
        if token_ids is None and by_default:
            return None
        if token_ids is None:
            reason = "the prompt has images or embeddings, whose positions are not those of a block"
            raise OptionError(POSITIONS, "block", reason, f"a text-only prompt, or {POSITIONS}=prompt")
        try:
            plan = plan_blocks(token_ids, defaults, request, page_size, self.token_limits, self.replicas_now)
        except TooMuchPadding:
            if by_default:
                return None
            raise
        return PlannedPrompt(self._with_room(plan, request), num_tokens, token_ids)

    def _check_memory(self, planned: PlannedPrompt) -> None:
        """Refuse a prompt that fits in no replica's memory, where max_model_len exceeds it (raises OptionError)."""
        is_divided = planned.plan is not None and planned.plan.shards
        if default_num_shards(self.vllm_config) == 1 or is_divided or self.page_size is None:
            return
        self._check_room(planned)

    def check_memory_of_one(self, planned: PlannedPrompt) -> None:
        """Refuse a prompt that one replica can not hold, although its plan divides it (raises VLLMValidationError)."""
        try:
            self._check_room(planned)
        except OptionError as error:
            raise rejection(error) from None

    def _check_room(self, planned: PlannedPrompt) -> None:
        assert self.page_size is not None
        room = self.num_pages * self.page_size
        num_tokens = planned.num_tokens if planned.plan is None else planned.plan.num_prompt_tokens
        if num_tokens >= room:
            reason = (
                f"the prompt of {num_tokens} tokens runs on one replica, whose KV memory holds {room}, output included"
            )
            raise OptionError(
                flat_name("shards"), "off", reason, f"a shorter prompt, or star=on with {flat_name('shards')}=on"
            )

    def describe(self, planned: PlannedPrompt) -> dict[str, Any]:
        """The plan as a response shows it to the client."""
        plan = describe(planned.plan, planned.num_tokens, self.vllm_config.model_config.hf_text_config)
        refusal = {} if planned.segments_refusal is None else {"segments_refusal": planned.segments_refusal}
        return {"padding_tokens": planned.padding_tokens} | plan | refusal


def rejection(error: OptionError) -> VLLMValidationError:
    """The error of a request whose option is refused, which is counted."""
    # A label for each unknown key would let clients make up labels.
    front_metrics().rejections.labels(error.name if error.name in FIELD_OF else "unknown").inc()
    return VLLMValidationError(str(error), parameter=error.name)
