"""The blocks of a prompt whose blocks have positions of their own.

A segment starts at each segment token of the context, or at each of its offsets where these are given. A segment longer
than B is cut there. What is before the first segment is the head, whose first whole pages are the anchor. Without
segments the context is cut every B tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from starling.scheduler.star.assignment import best_num_replicas_of
from starling.scheduler.star.client_tokens import work
from starling.scheduler.star.make_plan import ONE_REPLICA, ReplicaSet, check_shards, find_context_end, max_replicas
from starling.scheduler.star.options import StarOptions, flat_name, merge
from starling.scheduler.star.parsing import OptionError
from starling.scheduler.star.plan import StarPlan
from starling.scheduler.star.segments import (
    TokenLimits,
    check_block_size,
    check_padding,
    segment_option,
    segment_starts,
)
from starling.scheduler.star.sizes import find_anchor_and_overlap, find_block_size, find_segment_block_size

POSITIONS = flat_name("positions")


class TooMuchPadding(OptionError):
    """A prompt is too long with the padding of its blocks."""


def plan_blocks(
    token_ids: list[int],
    defaults: StarOptions,
    request: StarOptions | None,
    page_size: int,
    limits: TokenLimits,
    replicas: ReplicaSet = ONE_REPLICA,
) -> StarPlan | None:
    """The plan of a prompt with ``positions`` = ``block``.

    Args:
        token_ids: the prompt.
        defaults: the server's options.
        request: the request's own, or None where it gave none.
        page_size: tokens of a KV page.
        replicas: the server's replicas.

    Returns:
        None where the prompt runs dense: star is off, or the context is one block.

    Raises:
        TooMuchPadding: the prompt is too long with padding.
        OptionError: an option does not fit the page, the block or the prompt, or excludes another one.
    """
    given = set() if request is None else request.model_fields_set
    options = merge(defaults, request)
    check_padding(options, limits.vocabulary_size)
    if options.mode == "off" or (options.mode == "auto" and len(token_ids) < options.min_tokens):
        return None
    check_block_positions(options)
    limit = max_replicas(options, 0, replicas)
    if replicas.present is not None:
        limit = min(limit, replicas.present)
    if "shards" in given:
        check_shards(options, 0, replicas)
    find_size = find_block_size if segment_option(options)[1] is None else find_segment_block_size
    block_size = find_size(options, len(token_ids), page_size)
    context_end = find_context_end(options, given, len(token_ids))
    starts = segment_starts(options, given, token_ids, context_end)
    # A page each at least: known before each segment is looked at.
    refuse_padding(len(token_ids), len(starts) * page_size, limits, page_size, " or more")
    pieces = cut(starts, context_end, block_size)
    if len(pieces) < 2:
        return None
    head = pieces[0][1] if not starts or starts[0] else 0
    anchor_size, _ = find_anchor_and_overlap(options, given, block_size, page_size, independent=True)
    anchor_size = min(anchor_size, head // page_size * page_size)
    blocks, padded_end = lay_out(pieces, page_size)
    padded = padded_end + len(token_ids) - context_end
    refuse_padding(len(token_ids), padded, limits, page_size)
    padding = options.padding_token
    if padding is None:
        padding = default_padding(options.segment_token if starts else None, head, token_ids)
    plan = StarPlan(block_size, anchor_size, 0, padded_end, padded, documents=blocks, padding_token=padding)
    if limit == 1:
        return plan
    number = best_num_replicas_of(work(plan), anchor_size / block_size, limit)
    return replace(plan, replicas=number, shards=number > 1 and options.shards == "on")


def check_block_positions(options: StarOptions) -> None:
    """Refuse options that ``positions`` = ``block`` excludes, or lacks (raises OptionError)."""
    if options.positions != "block" or options.mode == "off":
        return

    def refused(field: str, reason: str, allowed: str) -> OptionError:
        return OptionError(flat_name(field), getattr(options, field), reason, allowed)

    with_block = f"with {POSITIONS}=block"
    check_block_size(options)
    if options.overlap_size:
        raise refused("overlap_size", f"{with_block} no block sees the one before it", "0")


def refuse_padding(num_tokens: int, padded: int, limits: TokenLimits, page_size: int, more: str = "") -> None:
    """Refuse a prompt that takes ``padded`` tokens with its padding, or more (raises TooMuchPadding)."""
    if padded > limits.max_prompt_tokens:
        reason = f"with each block on a KV page of {page_size} tokens the prompt of {num_tokens} takes {padded}{more}"
        allowed = f"up to {limits.max_prompt_tokens} tokens: fewer segments, or smaller pages (--block-size)"
        raise TooMuchPadding(POSITIONS, "block", reason, allowed)


def default_padding(mark: int | None, head: int, token_ids: list[int]) -> int:
    """The token between blocks where no option names one.

    It is a token that the prompt has already, so that no penalty of sampling counts another one. And it is the same in
    another order of the documents, since the key of a document's last page contains it.

    Args:
        mark: the token that starts each segment; None: there is none.
        head: tokens of the head.
    """
    if mark is not None:
        return mark
    return token_ids[0] if head else token_ids[-1]


def cut(starts: Sequence[int], context_end: int, block_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each block of a context. The first one is the head, unless a segment starts at 0.

    Args:
        starts: where segments start, ascending and below ``context_end``.
        block_size: the most tokens of a block.
    """
    borders = [*starts, context_end]
    head = min(borders[0], block_size)
    pieces = [(0, head)] if head else []
    for start, stop in pairwise(sorted({head, *borders})):
        pieces += [(first, min(first + block_size, stop)) for first in range(start, stop, block_size)]
    return pieces


def lay_out(pieces: list[tuple[int, int]], page_size: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Where the blocks are in the prompt with padding, each at the start of a page; and where the query starts."""
    blocks, start = [], 0
    for first, stop in pieces:
        blocks.append((start, start + stop - first))
        start += -(-(stop - first) // page_size) * page_size
    return tuple(blocks), start
