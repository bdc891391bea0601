"""Decision how one prompt is prefilled: made once, from the server's and the request's options, prompt and engine.

HTTP, gRPC and Python enter at ``decide`` through engine_ext/front/planning.py; `starling doctor` and `starling distil`
call it too. What is behind it reads the plan, and no options but ``star_retention``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from starling.config.parsing import OptionError
from starling.config.star import FIELD_OF, STAR_RETENTION, StarOptions, flat_name, merge
from starling.scheduler.planning.assignment import best_num_replicas, best_num_replicas_of, with_enough_replicas
from starling.scheduler.planning.documents import (
    NO_DOCUMENTS,
    Documents,
    TooLong,
    cut,
    documents_before,
    find_documents,
    lay_out,
    refuse_too_long,
)
from starling.scheduler.planning.facts import EngineFacts, PromptFacts
from starling.scheduler.planning.plan import DenseHeads, StarPlan, work
from starling.scheduler.planning.rules import ENGINE_RULES, OPTION_RULES, PROMPT_RULES, SIZE_RULES, Case, check
from starling.scheduler.planning.sizes import find_anchor_and_overlap, find_block_size

DEFAULT_QUERY_TOKENS = 512
DEFAULT_DENSE_HEADS = 0.1
ONLY_WITH_STAR = "with star=on or star=auto"

PLANNED = "starling_planned"
"""The key of an engine input that holds its Decision."""


@dataclass(frozen=True)
class Decision:
    """Decision how one prompt is prefilled.

    Attributes:
        plan: None: dense.
        why: of a dense prompt, why it has no plan; of a plan, why its blocks are no documents although the server's
            default asks for them; None: they are, or it does not ask.
        num_tokens: of the prompt, as the client sent it.
        token_ids: these tokens; None where the prompt has images or embeddings.
        given_by: option -> "request", "server" or "default": who gave it.
        retention: how long the prompt's cached pages stay: a word, or one for each document; None: nobody says.
        shown: the plan as a response shows it, to which its front adds where documents came from; None: not made.
        planning: when deciding began and ended, in nanoseconds since 1970; None: not noted.
    """

    plan: StarPlan | None
    why: str | None
    num_tokens: int
    token_ids: list[int] | None = None
    given_by: Mapping[str, str] = field(default_factory=dict)
    retention: str | tuple[str, ...] | None = None
    shown: dict[str, Any] | None = field(default=None, compare=False)
    planning: tuple[int, int] | None = field(default=None, compare=False)


def decision_of(engine_input: Any) -> Decision | None:
    """Return the decision that a front has made of an engine input, or None if it has made none."""
    return engine_input.get(PLANNED) if isinstance(engine_input, Mapping) else None


def decide(defaults: StarOptions, request: StarOptions | None, prompt: PromptFacts, engine: EngineFacts) -> Decision:
    """Decide how a prompt is prefilled.

    Args:
        defaults: the server's options.
        request: the request's own; None where it gave none.

    Raises:
        OptionError: the request's options can't be used, or the prompt fits in no replica's memory.
    """
    given: frozenset[str] = frozenset() if request is None else frozenset(request.model_fields_set)
    plan, why = _find_plan(Case(merge(defaults, request), given - ASKS_FOR_NO_PLAN, prompt, engine))
    retention = None if request is None else request.retention
    if retention is not None:
        check_retention(retention, plan, why, engine)
    if plan is None or not plan.shards:
        refuse_above_one_replica(prompt.num_tokens if plan is None else plan.num_prompt_tokens, engine)
    return Decision(plan, why, prompt.num_tokens, prompt.token_ids, who_gave(defaults, given), retention)


def _find_plan(case: Case) -> tuple[StarPlan | None, str | None]:
    """Find the plan, and why it is none or has no documents, by the steps of the decision in their order."""
    why = off(case) or unavailable(case) or dense_only(case)
    if why is not None:
        return None, why
    check((*ENGINE_RULES, *OPTION_RULES), case)
    of_documents = case.asks_for_documents
    sized = with_sizes(case, of_documents)
    why = too_short(case.options, case.prompt.num_tokens)
    if why is not None:
        return None, why
    check(PROMPT_RULES, case)
    is_known = case.prompt.segments is not None or case.options.says_where_documents_start
    documents = find_documents(case) if is_known else NO_DOCUMENTS
    context_end = find_context_end(case, documents)
    documents = documents_before(context_end, documents, case) if documents.starts else documents
    plan = None
    if documents.starts:
        sized = sized if of_documents else with_sizes(case, documents=True)
        try:
            plan = plan_of_documents(sized, documents, context_end)
        except TooLong as error:
            if case.has("segments"):
                raise
            documents = Documents(why=f"no documents: {error.reason}. Allowed: {error.allowed}")
    if plan is None:
        sized = with_sizes(case, documents=False) if of_documents or documents.why else sized
        sizes = sized.block_size, sized.anchor_size, sized.overlap_size
        plan = StarPlan(*sizes, context_end, case.prompt.num_tokens, dense_heads=find_dense_heads(sized))
    if len(plan.starts) < 2:
        one_block = f"a context of {context_end:,} tokens is one star block of {plan.block_size:,}"
        return None, (None if plan.documents else case.dense_word) or one_block
    if case.engine.with_adapter is not None:
        plan = case.engine.with_adapter(plan, case.options, case.prompt)
    return with_replicas(sized, plan), documents.why


def off(case: Case) -> str | None:
    """Why the prompt runs dense where star is off (raises OptionError: the request has options without an effect)."""
    if case.options.mode != "off":
        return None
    for name in sorted(case.given) if "mode" not in case.given else ():
        reason = "star is off on this server, so it would have no effect"
        raise OptionError(flat_name(name), getattr(case.options, name), reason, ONLY_WITH_STAR)
    return "star is off"


def unavailable(case: Case) -> str | None:
    """Why a prompt whose request asks for nothing runs dense on an engine that can't run star."""
    if case.given:
        return None
    reasons = [rule.reason(case) for rule in ENGINE_RULES]
    return next((f"star can't run here: {reason}" for reason in reasons if reason), None)


def dense_only(case: Case) -> str | None:
    """Why this kind of prompt has no star plan (raises OptionError: the request asks for star)."""
    reason = case.prompt.dense_only
    if reason is not None and case.given and case.options.mode == "on":
        name = "mode" if "mode" in case.given else min(case.given)
        raise OptionError(flat_name(name), getattr(case.options, name), reason, "star=off or star=auto")
    return reason


def too_short(options: StarOptions, num_tokens: int) -> str | None:
    """Return why a prompt of this length runs dense with star=auto, or None if it is long enough or star is on."""
    if options.mode != "auto" or num_tokens >= options.min_tokens:
        return None
    return f"{num_tokens:,} tokens, below star_min_tokens {options.min_tokens:,}"


def with_sizes(case: Case, documents: bool) -> Case:
    """Return the case with B, A and O; raise OptionError if a size or a number of replicas does not fit."""
    sizes = case.engine.quality_sizes
    block_size = find_block_size(case.options, case.prompt.num_tokens, case.page, documents, sizes)
    check(SIZE_RULES[:2], replace(case, block_size=block_size))
    independent = needs_independent_blocks(case.engine) and not case.options.dense_heads
    anchor, overlap = find_anchor_and_overlap(case.options, block_size, case.page, documents, independent=independent)
    sized = replace(case, block_size=block_size, anchor_size=anchor, overlap_size=overlap)
    check(SIZE_RULES[2:], sized)
    return sized


def needs_independent_blocks(engine: EngineFacts) -> bool:
    """Return whether blocks that need the block before would turn off what the server's replicas are for.

    Over how many a prompt is split (``star_replicas``) does not change what is computed.
    """
    return engine.replicas.size > 1 and engine.replicas.split_refusal is None


def find_context_end(case: Case, documents: Documents) -> int:
    """Find the token at which a prompt's query starts: the last document, unless the request says its length."""
    tokens, query = case.prompt.num_tokens, case.options.query_tokens
    if case.has("query_tokens"):
        return tokens - max(query or 0, 1)
    if documents.starts:
        return min(documents.starts[-1], tokens - 1)
    return tokens - max(min(DEFAULT_QUERY_TOKENS if query is None else query, tokens // 2), 1)


def find_dense_heads(case: Case) -> DenseHeads | None:
    """Find the heads that see everything; None if all heads see star blocks.

    By default there are some where the server can have them and blocks depend on one another anyway, by an overlap.
    They take most of the loss for little work (docs/dense-heads.md).
    """
    share = case.options.dense_heads
    if share is None and case.overlap_size and not case.engine.heads_refusals:
        share = DEFAULT_DENSE_HEADS
    scores = case.engine.heads if share else None
    count = scores.count(share) if scores is not None and share else 0
    return DenseHeads(count, scores.num_heads, scores.digest(count)) if scores is not None and count else None


def plan_of_documents(case: Case, documents: Documents, context_end: int) -> StarPlan:
    """Plan documents, each from the start of a KV page on; raise TooLong if they do not fit."""
    tokens, ids = case.prompt.num_tokens, case.prompt.token_ids or []
    # A page each at least: known before each document is looked at.
    refuse_too_long(len(documents.starts) * case.page, case, " or more")
    pieces = cut(documents.starts, context_end, case.block_size)
    head = pieces[0][1] if documents.starts[0] else 0
    spans, padded_end = lay_out(pieces, case.page)
    num_prompt_tokens = padded_end + tokens - context_end
    refuse_too_long(num_prompt_tokens, case)
    return StarPlan(
        case.block_size,
        min(case.anchor_size, head // case.page * case.page),
        0,
        padded_end,
        num_prompt_tokens,
        documents=spans,
        padding_token=documents.padding(head, ids),
    )


def with_replicas(case: Case, plan: StarPlan) -> StarPlan:
    """Split the plan's blocks over replicas; raise OptionError if these have too little memory."""
    replicas, wanted = case.engine.replicas, case.options.replicas
    limit = replicas.size if wanted == "auto" else wanted
    usable = 1 if replicas.split_refusal or not plan.is_independent else limit
    if usable == 1:
        return plan
    anchor_work = plan.anchor_size / plan.block_size
    if plan.documents:
        number = best_num_replicas_of(work(plan), anchor_work, usable)
    else:
        number = best_num_replicas(len(plan.starts), anchor_work, usable)
    plan = replace(plan, replicas=number, shards=number > 1 and case.options.shards == "on")
    if not plan.shards or not case.engine.num_pages:
        return plan
    return with_enough_replicas(plan, case.page, case.engine.num_pages, limit)


def refuse_above_one_replica(num_tokens: int, engine: EngineFacts) -> None:
    """Refuse a prompt that runs on one replica and does not fit there, where max_model_len exceeds its memory.

    Args:
        num_tokens: of the engine's prompt.

    Raises:
        OptionError: as above.
    """
    room = engine.num_pages * (engine.page_size or 1)
    if engine.divides_kv and engine.page_size is not None and num_tokens >= room:
        reason = f"the prompt of {num_tokens} tokens runs on one replica, whose KV memory holds {room}, output included"
        allowed = f"a shorter prompt, or star=on with {flat_name('shards')}=on"
        raise OptionError(flat_name("shards"), "off", reason, allowed)


def who_gave(defaults: StarOptions, given: frozenset[str]) -> dict[str, str]:
    """Option -> who gave its value: the request, the server, or nobody (the default)."""
    server = defaults.model_fields_set
    return {
        option: "request" if name in given else "server" if name in server else "default"
        for option, name in FIELD_OF.items()
    }


ASKS_FOR_NO_PLAN = frozenset({"retention"})
"""Options that a prompt can have without star."""


def check_retention(value: str | tuple[str, ...], plan: StarPlan | None, why: str | None, engine: EngineFacts) -> None:
    """Refuse what a request says of its pages, where it would have no effect.

    Args:
        value: a word, or one for each document of the plan.
        why: the prompt has no plan.

    Raises:
        OptionError: as above.
    """
    if engine.retention_refusals:
        reason = f"this server can't follow it: {'; '.join(engine.retention_refusals)}"
        raise OptionError(STAR_RETENTION, value, reason, f"no {STAR_RETENTION}")
    if isinstance(value, str):
        return
    number = 0 if plan is None else len(plan.documents_behind_head)
    if not number:
        reason = f"the prompt has no documents{'' if why is None else f': {why}'}"
        raise OptionError(STAR_RETENTION, value, reason, "low, normal or high, for the whole prompt")
    if len(value) != number:
        reason = f"it has {len(value)} words, and the prompt has {number} documents, without the head and the question"
        raise OptionError(STAR_RETENTION, value, reason, "one word for each document, as /starling/cached lists them")
