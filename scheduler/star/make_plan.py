"""Makes the star plan of a prompt whose blocks have one size: from options to numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from starling.scheduler.star.assignment import best_num_replicas
from starling.scheduler.star.options import StarOptions, flat_name, merge
from starling.scheduler.star.parsing import OptionError
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.sizes import find_anchor_and_overlap, find_block_size, has_default_overlap

DEFAULT_QUERY_TOKENS = 512


@dataclass(frozen=True)
class ReplicaSet:
    """The replicas that one prompt may be split over.

    Attributes:
        size: the data-parallel replicas of the server; with peers, how many servers there may be.
        split_refusal: why blocks can't be split over them; None where they can.
        shards_refusal: why the KV of such blocks can't be attended to where it is; None where it can.
        present: with peers, how many servers there are now; None: ``size``.
    """

    size: int = 1
    split_refusal: str | None = None
    shards_refusal: str | None = None
    present: int | None = None


ONE_REPLICA = ReplicaSet()


def make_plan(
    num_prompt_tokens: int,
    defaults: StarOptions,
    request: StarOptions | None,
    page_size: int,
    replicas: ReplicaSet = ONE_REPLICA,
) -> StarPlan | None:
    """Resolve options to numbers for one prompt.

    Args:
        num_prompt_tokens: length of the prompt.
        defaults: the server's options.
        request: the request's own, or None where it gave none.
        page_size: tokens of a KV page of the full-attention layers.
        replicas: the server's replicas.

    Returns:
        The plan; None: the prompt runs dense. A prompt whose context fits in one star block does so in any mode.

    Raises:
        OptionError: an option does not fit the page, the block, the prompt or the replicas.
    """
    options = merge(defaults, request)
    given: set[str] = set() if request is None else request.model_fields_set
    if options.mode == "off":
        for field in sorted(given - {"mode"}) if "mode" not in given else ():
            reason = f"{flat_name('mode')} is off on this server, so it would have no effect"
            raise OptionError(flat_name(field), getattr(options, field), reason, "with star=on or star=auto")
        return None
    block_size = find_block_size(options, num_prompt_tokens, page_size)
    independent = needs_independent_blocks(options, replicas)
    anchor_size, overlap_size = find_anchor_and_overlap(options, given, block_size, page_size, independent=independent)
    limit = max_replicas(options, overlap_size, replicas)
    if replicas.present is not None:
        limit = min(limit, replicas.present)
    if "shards" in given:
        check_shards(options, overlap_size, replicas)
    if options.mode == "auto" and num_prompt_tokens < options.min_tokens:
        return None
    context_end = find_context_end(options, given, num_prompt_tokens)
    plan = StarPlan(block_size, anchor_size, overlap_size, context_end, num_prompt_tokens)
    if len(plan.starts) < 2:
        return None
    if limit == 1:
        return plan
    number = best_num_replicas(len(plan.starts), anchor_size / block_size, limit)
    return replace(plan, replicas=number, shards=number > 1 and options.shards == "on")


def needs_independent_blocks(options: StarOptions, replicas: ReplicaSet) -> bool:
    """Whether blocks that need the block before them would turn off what the options or the server are for.

    Segments are there to be reused behind an edit, and a server has several replicas to split prompts over them. Over
    how many of them a prompt is split (``star_replicas``, peers that come and go) does not change what is computed.
    """
    has_segments = options.segment_token is not None or options.segments is not None
    return has_segments or (replicas.size > 1 and replicas.split_refusal is None)


def default_has_overlap(defaults: StarOptions, replicas: ReplicaSet) -> bool:
    """Whether the blocks of a long prompt depend on one another if its request gives no options."""
    independent = needs_independent_blocks(defaults, replicas)
    return bool(defaults.overlap_size) or has_default_overlap(defaults, independent=independent)


def max_replicas(options: StarOptions, overlap_size: int | None, replicas: ReplicaSet) -> int:
    """Over how many replicas blocks may be split.

    Raises:
        OptionError: the options ask for more replicas than can be used.
    """
    if options.replicas == "auto":
        return 1 if replicas.split_refusal or overlap_size else replicas.size
    if options.replicas == 1:
        return 1

    def refused(reason: str, allowed: str) -> OptionError:
        return OptionError(flat_name("replicas"), options.replicas, reason, allowed)

    if options.replicas > replicas.size:
        reason = f"this server has {replicas.size} (--data-parallel-size, --star-replica-peers)"
        raise refused(reason, f"auto, or 1 to {replicas.size}" if replicas.size > 1 else "auto or 1")
    if replicas.split_refusal:
        raise refused(replicas.split_refusal, "auto or 1")
    if overlap_size:
        overlap = f"{flat_name('overlap_size')}={overlap_size}"
        raise refused(
            f"with {overlap} each block needs the one before it", f"auto or 1, or {flat_name('overlap_size')}=0"
        )
    return options.replicas


def check_shards(options: StarOptions, overlap_size: int | None, replicas: ReplicaSet) -> None:
    """Refuse ``shards`` where no prompt is split over several replicas, or its KV can't stay there.

    Raises:
        OptionError: with the reason.
    """
    if options.shards == "off":
        return
    overlap, number = flat_name("overlap_size"), flat_name("replicas")
    for refused, reason in (
        (replicas.size == 1, "this server has one replica (--data-parallel-size, --star-replica-peers)"),
        (replicas.split_refusal, replicas.split_refusal),
        (replicas.shards_refusal, replicas.shards_refusal),
        (options.replicas == 1, f"{number}=1 keeps the prompt on one replica"),
        (overlap_size, f"with {overlap}={overlap_size} each block needs the one before it, on one replica"),
    ):
        if refused:
            raise OptionError(flat_name("shards"), options.shards, str(reason), "off")


def find_context_end(options: StarOptions, given: set[str], num_prompt_tokens: int) -> int:
    """The position at which a prompt's query starts.

    Args:
        given: the options that the request itself gave.

    Raises:
        OptionError: the request's context or query is longer than its prompt.

    Where the request says where segments start, and not how long the query is, the query is the last segment.
    """
    for field in ("query_tokens", "context_tokens"):
        value = getattr(options, field)
        if field in given and value is not None and value > num_prompt_tokens:
            raise OptionError(
                flat_name(field),
                value,
                f"the prompt has only {num_prompt_tokens} tokens",
                f"0 to {num_prompt_tokens}",
            )
    if isinstance(options.segments, tuple) and not given & {"query_tokens", "context_tokens"}:
        return min(options.segments[-1], num_prompt_tokens - 1)
    if options.context_tokens is not None:
        return min(options.context_tokens, num_prompt_tokens - 1)
    query_tokens = options.query_tokens
    if query_tokens is None or "query_tokens" not in given:
        query_tokens = min(DEFAULT_QUERY_TOKENS if query_tokens is None else query_tokens, num_prompt_tokens // 2)
    return num_prompt_tokens - max(query_tokens, 1)
