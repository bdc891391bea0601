"""Rules of star options that exclude one another, or do not fit an engine or a prompt: a table for the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from starling.config.parsing import OptionError
from starling.config.star import StarOptions, flat_name, num_blocks
from starling.scheduler.planning.facts import EngineFacts, PromptFacts
from starling.scheduler.planning.sizes import DEFAULT_QUALITY, measured_number

FLAT = ("dense_heads", "overlap_size", "replicas", "segments", "shards")
HEADS, OVERLAP, REPLICAS, SEGMENTS, SHARDS = map(flat_name, FLAT)
QUALITY = flat_name("quality")


@dataclass(frozen=True)
class Case:
    """The options of one prompt, or of a server before it has any, and what they are held against.

    Attributes:
        options: the server's, with the request's over them.
        given: the options that the request itself gave; where a server's defaults are checked, those of the server.
        block_size, anchor_size, overlap_size: as they were decided; 0 before.
    """

    options: StarOptions
    given: frozenset[str]
    prompt: PromptFacts
    engine: EngineFacts
    block_size: int = 0
    anchor_size: int = 0
    overlap_size: int = 0

    @property
    def asks_for_documents(self) -> bool:
        """Return whether an option says where documents start, and the request nothing that these can't have."""
        return self.options.says_where_documents_start and self.instead_of_documents is None

    @property
    def instead_of_documents(self) -> str | None:
        """Return what the request asks for that documents by the server's default can't have."""
        if not self.options.says_where_documents_start or "segments" in self.given:
            return None
        if self.has("block_size") and num_blocks(self.options) is not None:
            return f"{flat_name('block_size')}={self.options.block_size} is a share of the prompt"
        if self.has("quality") and self.dense_word:
            return self.dense_word
        if self.has("overlap_size") and self.options.overlap_size:
            return f"{OVERLAP}={self.options.overlap_size} is the end of the block before"
        if self.has("dense_heads") and self.options.dense_heads:
            return f"{HEADS}={self.options.dense_heads} has heads that see every block before"
        return None

    @property
    def has_documents(self) -> bool:
        """Return whether the request says where documents start; texts do so by themselves."""
        known = self.prompt.segments
        return (self.asks_for_documents and self.has("segments")) or (known is not None and known.source == "texts")

    @property
    def quality(self) -> str:
        """The word of the options."""
        return self.options.quality or DEFAULT_QUALITY

    @property
    def dense_word(self) -> str | None:
        """Reason why the word makes prompts dense on this server, or None if it does not."""
        is_dense = measured_number(self.options, self.engine.quality_sizes) == 1
        return f"on this server {QUALITY}={self.quality} is dense" if is_dense else None

    @property
    def page(self) -> int:
        return self.engine.page_size or 1

    def has(self, field: str) -> bool:
        """Return whether the request gave an option, and not to take the default back."""
        return field in self.given and getattr(self.options, field) is not None


@dataclass(frozen=True)
class Rule:
    """When an option is refused.

    Attributes:
        option: a field of StarOptions.
        when: for the documentation.
        reason: why a case refuses it; None, or nothing: it does not.
        allowed: what is allowed instead; may name attributes of the case in braces.
    """

    option: str
    when: str
    reason: Callable[[Case], str | None]
    allowed: str


def off_page(field: str) -> Rule:
    def reason(case: Case) -> str | None:
        value = getattr(case.options, field)
        is_off = isinstance(value, int) and value % case.page
        return f"it is not a multiple of the KV page of {case.page} tokens" if is_off else None

    return Rule(field, "it is not a multiple of the KV page", reason, "a multiple of {page}")


def above_model(field: str) -> Rule:
    def reason(case: Case) -> str | None:
        value, limit = getattr(case.options, field), case.engine.max_prompt_tokens
        if not case.has(field) or limit is None or not isinstance(value, int) or value <= limit + 1:
            return None
        return f"the model's context has {limit + 1} tokens"

    return Rule(field, "it is longer than the model's context", reason, "up to {model_tokens}")


def above_block(field: str) -> Rule:
    def reason(case: Case) -> str | None:
        is_above = case.has(field) and getattr(case.options, field) > case.block_size
        return f"it is larger than the star block of {case.block_size} tokens" if is_above else None

    allowed = "a multiple of {page} from 0 to {block_size}"
    return Rule(field, "it is larger than the star block", reason, allowed)


def _several(case: Case) -> bool:
    return case.options.replicas not in ("auto", 1)


def _too_many_replicas(case: Case) -> str | None:
    size, wanted = case.engine.replicas.size, case.options.replicas
    if wanted == "auto" or wanted <= size:
        return None
    return f"this server has {size} (--data-parallel-size)"


def _dependent(case: Case) -> str | None:
    if case.overlap_size:
        return f"with {OVERLAP}={case.overlap_size} each block needs the one before it"
    heads = case.options.dense_heads
    return f"with {HEADS}={heads} each block needs all blocks before it" if heads else None


def _shards(reason: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    return lambda case: reason(case) if case.options.shards == "on" and "shards" in case.given else None


def _quality_beside_size(case: Case) -> str | None:
    size = case.options.block_size
    return f"{flat_name('block_size')}={size} is given too" if case.has("quality") and case.has("block_size") else None


def _share_of_documents(case: Case) -> str | None:
    if not (case.has_documents and case.has("block_size") and num_blocks(case.options) is not None):
        return None
    return "the borders of documents would move with the length of the prompt"


def _overlap_of_documents(case: Case) -> str | None:
    if not (case.has_documents and case.has("overlap_size") and case.options.overlap_size):
        return None
    return "no document sees the one before it"


def _heads_of_documents(case: Case) -> str | None:
    if not (case.has_documents and case.has("dense_heads") and case.options.dense_heads):
        return None
    return "no head of a document sees the ones before it"


def _heads(reason: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    return lambda case: reason(case) if case.options.dense_heads else None


def _query_too_long(case: Case) -> str | None:
    tokens, query = case.prompt.num_tokens, case.options.query_tokens
    return f"the prompt has only {tokens} tokens" if case.has("query_tokens") and (query or 0) > tokens else None


ENGINE_RULES = (
    Rule("mode", "the engine can't run it", lambda c: "; ".join(c.engine.refusals), "off"),
    Rule(
        "mode",
        "layers have KV pages of several sizes",
        lambda c: "the full-attention layers have no one KV page size" if c.engine.page_size is None else None,
        "off",
    ),
)

OPTION_RULES = (
    Rule("quality", "`star_block_size` is given too", _quality_beside_size, "one of the two"),
    above_model("block_size"),
    above_model("anchor_size"),
    above_model("overlap_size"),
    above_model("query_tokens"),
    off_page("block_size"),
    off_page("anchor_size"),
    off_page("overlap_size"),
    Rule(
        "overlap_size",
        "the model can't have it",
        lambda c: c.engine.overlap_refusal if c.has("overlap_size") and c.options.overlap_size else None,
        "0",
    ),
    Rule("overlap_size", "with documents", _overlap_of_documents, "0"),
    Rule(
        "dense_heads",
        "the engine can't run it",
        _heads(lambda c: "; ".join(c.engine.heads_refusals)),
        "0",
    ),
    Rule(
        "dense_heads",
        "the scores of the model's KV heads are not known",
        _heads(lambda c: None if c.engine.heads else "the scores of this model's KV heads are not known"),
        "0, or a server with --star-heads and the file that `starling calibrate` makes",
    ),
    Rule("dense_heads", "with documents", _heads_of_documents, "0"),
    Rule("block_size", "a share of the prompt, with documents", _share_of_documents, "a number of tokens"),
    Rule(
        "segments",
        "the engine can't attend to documents",
        lambda c: "; ".join(c.engine.document_refusals) if c.asks_for_documents else None,
        "off",
    ),
)

SIZE_RULES = (
    above_block("anchor_size"),
    above_block("overlap_size"),
    Rule("replicas", "the server has fewer", _too_many_replicas, "auto, or up to {engine.replicas.size}"),
    Rule(
        "replicas",
        "prompts can't be split here",
        lambda c: c.engine.replicas.split_refusal if _several(c) else None,
        "auto or 1",
    ),
    Rule(
        "replicas",
        "blocks depend on one another",
        lambda c: _dependent(c) if _several(c) else None,
        f"auto or 1, or {OVERLAP}=0 and {HEADS}=0",
    ),
    Rule(
        "shards",
        "the server has one replica",
        _shards(
            lambda c: (
                "this server has one replica (--data-parallel-size)"
                if c.engine.replicas.size == 1
                else c.engine.replicas.split_refusal or c.engine.replicas.shards_refusal
            )
        ),
        "off",
    ),
    Rule(
        "shards",
        "the prompt stays on one replica",
        _shards(lambda c: f"{REPLICAS}=1 keeps the prompt on one replica" if c.options.replicas == 1 else None),
        "off",
    ),
    Rule("shards", "blocks depend on one another", _shards(_dependent), "off"),
)

PROMPT_RULES = (Rule("query_tokens", "it is longer than the prompt", _query_too_long, "0 to {prompt.num_tokens}"),)

RULES = (*ENGINE_RULES, *OPTION_RULES, *SIZE_RULES, *PROMPT_RULES)


def check(rules: Iterable[Rule], case: Case) -> None:
    """Refuse an option by the first rule that applies (raises OptionError)."""
    for rule in rules:
        reason = rule.reason(case)
        if reason:
            value: Any = getattr(case.options, rule.option)
            raise OptionError(flat_name(rule.option), value, reason, rule.allowed.format(**_attributes(case)))


def _attributes(case: Case) -> dict[str, Any]:
    return {
        "page": case.page,
        "block_size": case.block_size,
        "engine": case.engine,
        "model_tokens": (case.engine.max_prompt_tokens or 0) + 1,
        "prompt": case.prompt,
    }


def check_defaults(options: StarOptions, engine: EngineFacts) -> None:
    """Refuse server defaults that no prompt could use (raises OptionError)."""
    if isinstance(options.segments, tuple):
        raise OptionError(SEGMENTS, options.segments, "offsets are those of one prompt", "auto, or the text of a token")
    if options.mode == "off":  # a request that turns star on may have no documents
        engine = replace(engine, find_document_refusals=tuple)
    case = Case(options, frozenset(options.model_fields_set), PromptFacts(0), engine)
    if options.mode != "off" and options.segments in (None, "off") and case.dense_word:
        raise OptionError(
            QUALITY, case.quality, f"{QUALITY}_sizes says that it is dense, and so every prompt", "another, or star=off"
        )
    check((*ENGINE_RULES, *OPTION_RULES) if options.mode != "off" else OPTION_RULES, case)
    size = options.block_size
    sized = replace(case, block_size=size if isinstance(size, int) else 2**62, overlap_size=options.overlap_size or 0)
    check(SIZE_RULES, sized)


def check_sizes(options: StarOptions, page_size: int | None) -> None:
    """Hold the sizes of a server's defaults against the KV page of its engine (raises OptionError)."""
    kept = {"mode", "block_size", "anchor_size", "overlap_size"}
    check_defaults(StarOptions(**options.model_dump(include=kept)), EngineFacts(page_size))


def refused_options(options: StarOptions, engine: EngineFacts) -> list[str]:
    """Return the options that no request can give by itself: each with the reason and what is allowed.

    Args:
        options: the server's defaults.
    """
    refused = []
    asked = {"mode": "on", "overlap_size": engine.page_size or 1, "dense_heads": 0.1, "segments": "auto"}
    asked |= {"replicas": 2, "shards": "on"}
    for field, value in asked.items():
        request = options.model_copy(update={"mode": "on", field: value})
        overlap_size = request.overlap_size or 0
        case = Case(request, frozenset({field}), PromptFacts(0), engine, 2**62, overlap_size=overlap_size)
        try:
            check([rule for rule in RULES if rule.option == field], case)
        except OptionError as error:
            refused.append(str(error))
            if field == "mode":
                break
    return refused
