"""Segments that a client marks in its prompt, moved to star blocks' borders, so that an edit shifts no other segment.

Padding fills the gap before each segment. Padding tokens are prompt tokens like others: their own block, the query and
the output see them. They are white space, which changes a model's answer least (benchmarks/segment_padding.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scheduler.star.options import StarOptions, flat_name, merge, parse_options
from scheduler.star.parsing import OptionError
from scheduler.star.plan import find_context_end
from scheduler.star.sizes import find_block_size

SEGMENT_TOKEN = flat_name("segment_token")
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
            names a segment token that its context does not have; no padding token is known, or it is outside of the
            vocabulary, or given without a segment token; the context or the query is longer than the prompt.
    """
    given = set() if request is None else request.model_fields_set
    if defaults.segment_token is None and not given & {"segment_token", "padding_token"}:
        return token_ids, request
    options = merge(defaults, request)
    check_padding(options, limits.vocabulary_size)
    mark = options.segment_token
    if mark is None or options.mode == "off" or (options.mode == "auto" and len(token_ids) < options.min_tokens):
        return token_ids, request
    if "segment_token" in given:
        check_block_size(options)
    elif options.block_size == 0:
        return token_ids, request
    context_end = find_context_end(options, given, len(token_ids))
    context, query = token_ids[:context_end], token_ids[context_end:]
    if mark not in context:
        if "segment_token" in given:
            reason = f"it does not occur in the context, the first {context_end} tokens of the prompt"
            raise OptionError(SEGMENT_TOKEN, mark, reason, "a token that starts the prompt's segments")
        return token_ids, request
    block_size = find_block_size(options, len(token_ids), page_size)
    if context_end <= block_size:  # the prompt runs dense
        return token_ids, request
    before = len(token_ids)
    room = max(limits.max_prompt_tokens - before, 0)
    gaps = find_gaps(context, mark, block_size, room)
    padding_tokens = sum(length for _, length in gaps)
    if padding_tokens > room:
        aligned = before + padding_tokens
        reason = f"with its segments at star blocks' borders the prompt of {before} tokens has at least {aligned}"
        raise OptionError(
            SEGMENT_TOKEN, mark, reason, f"up to {limits.max_prompt_tokens} tokens: smaller blocks or fewer segments"
        )
    padding = limits.white_space() if options.padding_token is None else options.padding_token
    if padding is None:
        reason = (
            f"{SEGMENT_TOKEN}={mark} needs it, as the model's tokenizer has no token for a space, nor for a line break"
        )
        raise OptionError(PADDING_TOKEN, None, reason, "the id of a token without meaning, such as a space")
    context = fill_gaps(context, gaps, padding)
    # The padded prompt may be beyond the power of two up to which the default B is this one.
    fixed = {"block_size": block_size, "query_tokens": None, "context_tokens": len(context)}
    return context + query, (request or parse_options({}, flat=True)).model_copy(update=fixed)


def check_segment_options(options: StarOptions, vocabulary_size: int) -> None:
    """Refuse a server's defaults that no prompt could use (raises OptionError)."""
    check_token(SEGMENT_TOKEN, options.segment_token, vocabulary_size)
    check_padding(options, vocabulary_size)
    check_block_size(options)


def check_padding(options: StarOptions, vocabulary_size: int) -> None:
    """Refuse a padding token outside of the vocabulary, or without a segment token (raises OptionError)."""
    check_token(PADDING_TOKEN, options.padding_token, vocabulary_size)
    if options.padding_token is not None and options.segment_token is None:
        reason = f"without {SEGMENT_TOKEN} it would have no effect"
        raise OptionError(PADDING_TOKEN, options.padding_token, reason, f"with {SEGMENT_TOKEN}")


def check_token(name: str, token: int | None, vocabulary_size: int) -> None:
    """Refuse a token id outside of the vocabulary (raises OptionError)."""
    if token is not None and token >= vocabulary_size:
        reason = f"the model's vocabulary has {vocabulary_size} tokens"
        raise OptionError(name, token, reason, f"0 to {vocabulary_size - 1}")


def check_block_size(options: StarOptions) -> None:
    """Refuse segments where the block borders depend on the length of the prompt (raises OptionError)."""
    if options.segment_token is not None and options.block_size == 0:
        blocks = f"{flat_name('num_blocks')}={options.num_blocks}"
        reason = f"with {blocks} the borders move with the length of the prompt"
        allowed = f"no {SEGMENT_TOKEN}, or a {flat_name('block_size')}"
        raise OptionError(SEGMENT_TOKEN, options.segment_token, reason, allowed)


def find_gaps(token_ids: list[int], mark: int, block_size: int, room: float = math.inf) -> list[tuple[int, int]]:
    """(position, length) of each padding that moves a ``mark`` to a multiple of ``block_size``.

    A mark at position 0 needs no padding. A mark at position 1 gets none either: many tokenizers put one token before
    the prompt.

    Args:
        room: the search ends once the paddings have more than so many tokens.
    """
    gaps: list[tuple[int, int]] = []
    position = added = 0
    for _ in range(token_ids.count(mark)):
        if added > room:
            break
        position = token_ids.index(mark, position)
        length = -(position + added) % block_size
        if length and position > 1:
            gaps.append((position, length))
            added += length
        position += 1
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
