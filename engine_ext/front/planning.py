"""Plan of each prompt of an engine: the facts of the engine and of the prompt, handed to ``decide``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from starling.attention_backends.star.model_heads import scores_of
from starling.attention_backends.star.refusals import (
    document_refusals,
    heads_refusals,
    is_attamba,
    options_of,
    star_refusals,
)
from starling.config.entry import ENTRY, StarlingConfig, config_of
from starling.config.parsing import OptionError
from starling.config.star import FIELD_OF, StarOptions, is_star_key, parse_options
from starling.engine_ext.front.bounds import shortened
from starling.engine_ext.front.misplaced import nearly, refuse_among_options
from starling.engine_ext.front.observability import front_metrics
from starling.features import make_features
from starling.scheduler.planning.decide import Decision, decide
from starling.scheduler.planning.documents import NOT_ONE_TOKEN, refuse_many_offsets
from starling.scheduler.planning.facts import ONE_REPLICA, EngineFacts, PromptFacts
from starling.scheduler.planning.plan import describe, model_keys
from starling.scheduler.planning.rules import SEGMENTS
from starling.vllm_compat.config import page_size_before_start

NO_OVERLAP = "an Attamba model's window ends at the border of a star block, and an overlap would go beyond it"


def star_page_size(vllm_config: Any) -> int:
    """Return the tokens of a full-attention KV page, as far as the configuration says before the engine's start."""
    own = getattr(vllm_config.model_config.hf_text_config, "page_tokens", None)
    return own or page_size_before_start(vllm_config)


def engine_facts(vllm_config: Any, page_size: int | None, features: Mapping[str, Any] | None = None) -> EngineFacts:
    """Return the facts of an engine from its configuration and the reports of engine cores that have started.

    Args:
        page_size: tokens of a KV page of the full-attention layers.
        features: the features' objects in a front of the engine, or None to make them.
    """
    features = make_features("front", vllm_config) if features is None else features
    replicas, retention, adapter = map(features.get, ("replicas", "retention", "adapter"))
    return EngineFacts(
        page_size,
        refusals=tuple(star_refusals(vllm_config)),
        find_document_refusals=functools.cache(lambda: tuple(document_refusals(vllm_config))),
        find_heads=functools.cache(lambda: scores_of(vllm_config)),
        find_heads_refusals=functools.cache(lambda: tuple(heads_refusals(vllm_config))),
        retention_refusals=("the server has no retention",) if retention is None else retention.refusals,
        overlap_refusal=NO_OVERLAP if is_attamba(vllm_config) else None,
        replicas=ONE_REPLICA if replicas is None else replicas.replicas,
        max_prompt_tokens=vllm_config.model_config.max_model_len - 1,  # a prompt leaves room for one token of output
        divides_kv=replicas is not None and replicas.divides_kv,
        quality_sizes=options_of(vllm_config).quality_sizes,
        with_adapter=None if adapter is None else adapter.planned,
    )


logger = init_logger("vllm.starling")

HOW_TO_ACTIVATE = (
    f"Starling is not activated on this server: start it with `starling serve`, or give vLLM "
    f"--additional-config '{{\"{ENTRY}\": {{}}}}'"
)


def usable_defaults(star: StarOptions, engine: EngineFacts) -> StarOptions:
    """Return the server's star options without those that its engines, as found at their start, can't follow.

    Options that the configuration alone excludes are refused before the start (activation.py).
    """
    usable: dict[str, str | int] = {}
    if engine.replicas.split_refusal:
        usable |= {"replicas": "auto", "shards": "off"}
    if engine.overlap_refusal:
        usable |= {"overlap_size": 0}
    return star.model_copy(update=usable)


def read_request(extra_args: Mapping[str, Any], num_tokens: int) -> StarOptions | None:
    """Return the star options of a request, or None if it gives none.

    Args:
        extra_args: extra arguments of its sampling parameters, which may have other keys too.
        num_tokens: number of tokens of its prompt.

    Raises:
        OptionError: an option's name or value does not exist, or a key resembles an option.
    """
    given = {key: value for key, value in extra_args.items() if is_star_key(key)}
    if len(given) < len(extra_args):
        for key in extra_args:
            refuse_among_options(key, extra_args[key])
            if key not in given and (name := nearly(key)) is not None:
                raise OptionError(key, extra_args[key], f"there is no such option, did you mean {name}", name)
    if not given:
        return None
    offsets = given.get(SEGMENTS)
    if isinstance(offsets, (list, tuple)):
        refuse_many_offsets(offsets, num_tokens)
    return parse_options(given)


def only_token(tokenizer: Any, text: str) -> int | None:
    """Return the one token that a text is, or None if it is no token or several."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return int(ids[0]) if len(ids) == 1 else None


def refuse_segment_text(text: Any, model_config: Any) -> None:
    """Refuse a server's ``star_segments`` that is a text but not one token of the model's tokenizer (OptionError)."""
    if not isinstance(text, str) or text in ("auto", "off") or model_config.skip_tokenizer_init:
        return
    from vllm.tokenizers import cached_tokenizer_from_config

    if only_token(cached_tokenizer_from_config(model_config), text) is None:
        raise OptionError(SEGMENTS, text, NOT_ONE_TOKEN, "auto, off, or the text of one token")


class PromptPlanner:
    """Planner of the prompts of one engine."""

    def __init__(self, vllm_config: Any, tokenizer: Any = None) -> None:
        self.config = config_of(vllm_config)
        self.vllm_config = vllm_config
        self.tokenizer = tokenizer
        self.features = {} if self.config is None else make_features("front", vllm_config)
        facts = EngineFacts(None, (HOW_TO_ACTIVATE,))
        if self.config is not None:
            facts = engine_facts(vllm_config, None, self.features)
        self.facts = replace(facts, token_of=lru_cache(maxsize=256)(self.token_of))
        self.defaults = usable_defaults((self.config or StarlingConfig()).star, facts)

    @property
    def engine(self) -> EngineFacts:
        """Facts of the engine as known now."""
        return replace(self.facts, page_size=self.page_size, num_pages=self.num_pages)

    @property
    def model(self) -> Any:
        """Configuration of the text model."""
        return self.vllm_config.model_config.hf_text_config

    @property
    def page_size(self) -> int | None:
        """Tokens of a full-attention KV page, known once the engine core has started."""
        return self.vllm_config.cache_config.effective_attention_block_size

    @property
    def num_pages(self) -> int:
        """KV pages of a replica, known once the engine core has started. vLLM adds up all replicas' and null pages."""
        engines = self.vllm_config.parallel_config.data_parallel_size
        return (self.vllm_config.cache_config.num_gpu_blocks or 0) // engines - 1

    def token_of(self, text: str) -> int | None:
        """Return the one token that a text is, or None if it is no token or several, or if there is no tokenizer."""
        return None if self.tokenizer is None else only_token(self.tokenizer, text)

    def plan(self, extra_args: Mapping[str, Any] | None, prompt: PromptFacts) -> Decision:
        """Decide how a request's prompt is prefilled.

        Args:
            extra_args: extra arguments of the request's sampling parameters.
            prompt: the facts of the prompt.

        Raises:
            VLLMValidationError: the request's options can't be used; HTTP 400, INVALID_ARGUMENT.
        """
        try:
            if self.config is None:
                for name in filter(is_star_key, extra_args or ()):
                    value = (extra_args or {})[name]
                    raise OptionError(name, value, HOW_TO_ACTIVATE, f"no star options without {ENTRY}")
                return Decision(None, None, prompt.num_tokens, prompt.token_ids)
            request = read_request(extra_args or {}, prompt.num_tokens)
            decision = decide(self.defaults, request, prompt, self.engine)
        except OptionError as error:
            raise rejection(error) from None
        logger.debug("a prompt of %d tokens: %s", prompt.num_tokens, decision.plan or decision.why)
        return decision

    def describe(self, decision: Decision) -> dict[str, Any]:
        """Return the decision as a response shows it to the client."""
        return describe(decision.plan, decision.num_tokens, self.model, decision.why)

    def model_keys(self, decision: Decision) -> dict[str, Any] | None:
        """Return the numbers of attended keys of a model that counts them itself, or None if the plan's own hold."""
        return model_keys(decision.plan, decision.num_tokens, self.model)


def rejection(error: OptionError) -> VLLMValidationError:
    """Return the error for a request with a refused option, and count the rejection."""
    # A label for each unknown key would let clients make up labels.
    front_metrics().rejections.labels(error.name if error.name in FIELD_OF else "unknown").inc()
    return VLLMValidationError(shortened(str(error)), parameter=shortened(error.name))
