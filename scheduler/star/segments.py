"""Segments that a client marks in its prompt, moved to star blocks' borders, so that an edit shifts no other segment.

Padding fills the gap before each segment. Padding tokens are prompt tokens like others: their own block, the query and
the output see them. They are white space, which changes a model's answer least (benchmarks/segment_padding.py).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from starling.scheduler.star.make_plan import find_context_end
from starling.scheduler.star.options import StarOptions, flat_name, merge, parse_options
from starling.scheduler.star.parsing import OptionError, shown
from starling.scheduler.star.sizes import find_block_size

SEGMENT_TOKEN = flat_name("segment_token")
SEGMENTS = flat_name("segments")
PADDING_TOKEN = flat_name("padding_token")


@dataclass(frozen=True)
class TokenLimits:
    """What a model takes as tokens.

    Attributes:
        max_prompt_tokens: the longest prompt.
        vocabulary_size: token ids are below it.
        white_space: returns the default padding token; None: the tokenizer has none, so that an option has to name one.
    """

    max_prompt_tokens: int
    vocabulary_size: int
    white_space: Callable[[], int | None]


def align(
    token_ids: list[int], defaults: StarOptions, request: StarOptions | None, page_size: int, limits: TokenLimits
) -> tuple[list[int], StarOptions | None]:
    """Move each segment of a prompt's context to a star block's border.

    Args:
        token_ids: the prompt.
        defaults: the server's options.
        request: the request's own, or None where it gave none.
        page_size: tokens of a KV page of the full-attention layers.

    Returns:
        The padded prompt, and the request's options with B and the context's end in the padded prompt. Both are the
        arguments themselves where there is nothing to move.

    Raises:
        OptionError: the padded prompt is too long; the block size follows from the length of the prompt; the request
            says where segments start, and none does in the context; no padding token is known, or it is outside of the
            vocabulary, or given without segments; the context or the query is longer than the prompt.
    """
    given = set() if request is None else request.model_fields_set
    if defaults.segment_token is None and not given & {"segment_token", "segments", "padding_token"}:
        return token_ids, request
    options = merge(defaults, request)
    check_padding(options, limits.vocabulary_size)
    name, value = segment_option(options)
    if value is None or options.mode == "off" or (options.mode == "auto" and len(token_ids) < options.min_tokens):
        return token_ids, request
    if given & {"segment_token", "segments"}:
        check_block_size(options)
    elif options.block_size == 0:
        return token_ids, request
    context_end = find_context_end(options, given, len(token_ids))
    context, query = token_ids[:context_end], token_ids[context_end:]
    starts = segment_starts(options, given, token_ids, context_end)
    if not starts:
        return token_ids, request
    block_size = find_block_size(options, len(token_ids), page_size)
    if context_end <= block_size:  # the prompt runs dense
        return token_ids, request
    before = len(token_ids)
    room = max(limits.max_prompt_tokens - before, 0)
    gaps = find_gaps(starts, block_size, room)
    padding_tokens = sum(length for _, length in gaps)
    if padding_tokens > room:
        aligned = before + padding_tokens
        reason = f"with its segments at star blocks' borders the prompt of {before} tokens has at least {aligned}"
        allowed = f"up to {limits.max_prompt_tokens} tokens: smaller blocks or fewer segments"
        raise OptionError(name, value, reason, allowed)
    padding = limits.white_space() if options.padding_token is None else options.padding_token
    if padding is None:
        reason = (
            f"{name}={shown(value)} needs it, as the model's tokenizer has no token for a space, nor for a line break"
        )
        raise OptionError(PADDING_TOKEN, None, reason, "the id of a token without meaning, such as a space")
    context = fill_gaps(context, gaps, padding)
    # The padded prompt may be beyond the power of two up to which the default B is this one.
    fixed = {"block_size": block_size, "query_tokens": None, "context_tokens": len(context)}
    return context + query, (request or parse_options({}, flat=True)).model_copy(update=fixed)


def check_segment_options(options: StarOptions, vocabulary_size: int) -> None:
    """Refuse a server's defaults that no prompt could use (raises OptionError)."""
    if isinstance(options.segments, tuple):
        raise OptionError(SEGMENTS, options.segments, "offsets are those of one prompt", "auto")
    if options.segments == "auto" and options.positions != "block":
        positions = flat_name("positions")
        reason = f"with {positions}=prompt each message of each chat would be padded to a star block"
        raise OptionError(SEGMENTS, "auto", reason, f"with {positions}=block, or {SEGMENTS}=auto in a request")
    check_token(SEGMENT_TOKEN, options.segment_token, vocabulary_size)
    check_padding(options, vocabulary_size)
    check_block_size(options)


def check_padding(options: StarOptions, vocabulary_size: int) -> None:
    """Refuse a padding token outside of the vocabulary, or without segments (raises OptionError)."""
    check_token(PADDING_TOKEN, options.padding_token, vocabulary_size)
    if options.padding_token is not None and segment_option(options)[1] is None:
        reason = f"without {SEGMENT_TOKEN} or {SEGMENTS} it would have no effect"
        raise OptionError(PADDING_TOKEN, options.padding_token, reason, f"with {SEGMENT_TOKEN} or {SEGMENTS}")


def check_token(name: str, token: int | None, vocabulary_size: int) -> None:
    """Refuse a token id outside of the vocabulary (raises OptionError)."""
    if token is not None and token >= vocabulary_size:
        reason = f"the model's vocabulary has {vocabulary_size} tokens"
        raise OptionError(name, token, reason, f"0 to {vocabulary_size - 1}")


def check_block_size(options: StarOptions) -> None:
    """Refuse segments where the block borders depend on the length of the prompt (raises OptionError)."""
    name, value = segment_option(options)
    if value is not None and options.block_size == 0:
        blocks = f"{flat_name('num_blocks')}={options.num_blocks}"
        reason = f"with {blocks} the borders move with the length of the prompt"
        raise OptionError(name, value, reason, f"no {name}, or a {flat_name('block_size')}")


def segment_option(options: StarOptions) -> tuple[str, Any]:
    """The option that says where segments start, and its value; None: no option does."""
    return (SEGMENTS, options.segments) if options.segments is not None else (SEGMENT_TOKEN, options.segment_token)


def segment_starts(options: StarOptions, given: set[str], token_ids: list[int], context_end: int) -> list[int]:
    """The positions of a prompt's context at which segments start, ascending.

    Args:
        given: the options that the request itself gave.

    Raises:
        OptionError: an offset is not a position of the prompt, or the request says where segments start and none does
            in its context.
    """
    name, value = segment_option(options)
    context = f"the context, the first {context_end} tokens of the prompt"
    if isinstance(value, tuple):
        if value[-1] >= len(token_ids):
            reason = f"the prompt has only {len(token_ids)} tokens, and {value[-1]} is not one of them"
            raise OptionError(name, value, reason, f"offsets from 0 to {len(token_ids) - 1}")
        starts = list(value[: bisect_left(value, context_end)])
        # Without a length of its own the query is the last segment, and the context may be the head alone.
        if not starts and "segments" in given and given & {"query_tokens", "context_tokens"}:
            raise OptionError(name, value, f"no segment starts in {context}", "offsets of the context")
        return starts
    starts = [] if value is None else positions_of(value, token_ids, context_end)
    if not starts and "segment_token" in given and value is not None:
        reason = f"it does not occur in {context}"
        raise OptionError(name, value, reason, "a token that starts the prompt's segments")
    return starts


def refuse_many_offsets(value: Any, num_tokens: int) -> None:
    """Refuse more offsets than a prompt has tokens before each of them is looked at (raises OptionError)."""
    if isinstance(value, (list, tuple)) and len(value) > num_tokens:
        reason = f"it has {len(value)} elements, and the prompt has {num_tokens} tokens"
        raise OptionError(SEGMENTS, value, reason, f"offsets from 0 to {num_tokens - 1}")


def positions_of(mark: int, token_ids: list[int], end: int) -> list[int]:
    """The positions of a token before ``end``."""
    return np.flatnonzero(np.asarray(token_ids[:end], dtype=np.int64) == mark).tolist()


def find_gaps(starts: Sequence[int], block_size: int, room: float = math.inf) -> list[tuple[int, int]]:
    """(position, length) of each padding that moves a segment's start to a multiple of ``block_size``.

    A segment at position 0 needs no padding. One at position 1 gets none either: many tokenizers put one token before
    the prompt.

    Args:
        starts: the positions of the segments' first tokens.
        room: the search ends once the paddings have more than so many tokens.
    """
    gaps: list[tuple[int, int]] = []
    added = 0
    for position in starts:
        if added > room:
            break
        length = -(position + added) % block_size
        if length and position > 1:
            gaps.append((position, length))
            added += length
    return gaps


def fill_gaps(token_ids: list[int], gaps: list[tuple[int, int]], padding: int) -> list[int]:
    """The tokens with ``padding`` in each gap of find_gaps."""
    filled: list[int] = []
    start = 0
    for position, length in gaps:
        filled += token_ids[start:position]
        filled += [padding] * length
        start = position
    return filled + token_ids[start:]
