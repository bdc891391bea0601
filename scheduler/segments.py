"""Segments that a client marks in its prompt, moved to star blocks' borders: then an edit shifts no other segment.

What is put before each is tokens of the prompt like others, seen by their own block, the query and the output: white
space, of which a model makes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduler.options import OptionError, StarOptions, flat_name, merge, parse_options
from scheduler.plan import find_block_size, find_context_end, fit_default

SEGMENT_TOKEN = flat_name("segment_token")
PADDING_TOKEN = flat_name("padding_token")


@dataclass(frozen=True)
class TokenLimits:
    """What a model takes as tokens.

    Attributes:
        prompt: tokens of a prompt at most.
        vocabulary: ids are below it.
        white_space: says the token to pad with where no option does; None: one has to.
    """

    prompt: int
    vocabulary: int
    white_space: Callable[[], int | None]


def align(
    token_ids: list[int], defaults: StarOptions, request: StarOptions | None, page: int, limits: TokenLimits
) -> tuple[list[int], StarOptions | None]:
    """A prompt with each segment of its context at a border, and its own options with the end of the context there.

    Args:
        token_ids: the prompt.
        defaults: the server's options.
        request: the request's own, or None where it gave none.
        page: tokens of a KV page of the full-attention layers.

    Raises:
        OptionError: the prompt gets too long; the size of a block follows from the length of the prompt; the request
            names a mark, and its context has none; nothing says the padding, or it is no token, or without a mark;
            another option that the context's end follows from does not fit.
    """
    given = set() if request is None else request.model_fields_set
    if defaults.segment_token is None and not given & {"segment_token", "padding_token"}:
        return token_ids, request
    defaults = fit_default(defaults, page)
    options = defaults if request is None else merge(defaults, request)
    check_padding(options, limits.vocabulary)
    mark = options.segment_token
    if mark is None or options.mode == "off" or (options.mode == "auto" and len(token_ids) < options.min_tokens):
        return token_ids, request
    if "segment_token" in given:
        check_block_size(options)
    elif not options.block_size:
        return token_ids, request
    context_end = find_context_end(options, given, len(token_ids))
    context, query = token_ids[:context_end], token_ids[context_end:]
    if mark not in context:
        if "segment_token" in given:
            reason = f"it does not occur in the context, the first {context_end} tokens of the prompt"
            raise OptionError(SEGMENT_TOKEN, mark, reason, "a token that starts the prompt's segments")
        return token_ids, request
    block_size = find_block_size(options, len(token_ids), page)
    if context_end <= block_size:  # dense
        return token_ids, request
    gaps = find_gaps(context, mark, block_size)
    had, aligned = len(token_ids), len(token_ids) + sum(length for _, length in gaps)
    if aligned > max(had, limits.prompt):
        reason = f"with its segments at star blocks' borders the prompt of {had} tokens has {aligned}"
        raise OptionError(
            SEGMENT_TOKEN, mark, reason, f"up to {limits.prompt} tokens: smaller blocks or fewer segments"
        )
    padding = limits.white_space() if options.padding_token is None else options.padding_token
    if padding is None:
        reason = (
            f"{SEGMENT_TOKEN}={mark} needs it, as the model's tokenizer has no token for a space, nor for a line break"
        )
        raise OptionError(PADDING_TOKEN, None, reason, "the id of a token that says nothing")
    context = fill_gaps(context, gaps, padding)
    there = {"query_tokens": None, "context_tokens": len(context)}
    return context + query, (request or parse_options({}, flat=True)).model_copy(update=there)


def check_marks(options: StarOptions, vocabulary: int) -> None:
    """Refuse a server's defaults that no prompt could use (raises OptionError)."""
    check_token(SEGMENT_TOKEN, options.segment_token, vocabulary)
    check_padding(options, vocabulary)
    check_block_size(options)


def check_padding(options: StarOptions, vocabulary: int) -> None:
    """Refuse a padding that is no token, or that nothing is padded with (raises OptionError)."""
    check_token(PADDING_TOKEN, options.padding_token, vocabulary)
    if options.padding_token is not None and options.segment_token is None:
        reason = f"without {SEGMENT_TOKEN} it would have no effect"
        raise OptionError(PADDING_TOKEN, options.padding_token, reason, f"with {SEGMENT_TOKEN}")


def check_token(name: str, token: int | None, vocabulary: int) -> None:
    """Refuse what the model has no embedding for (raises OptionError)."""
    if token is not None and token >= vocabulary:
        raise OptionError(name, token, f"the model's vocabulary has {vocabulary} tokens", f"0 to {vocabulary - 1}")


def check_block_size(options: StarOptions) -> None:
    """Refuse marks where each length of a prompt has other borders (raises OptionError)."""
    if options.segment_token is not None and not options.block_size:
        blocks = f"{flat_name('num_blocks')}={options.num_blocks}"
        reason = f"with {blocks} the borders move with the length of the prompt"
        raise OptionError(SEGMENT_TOKEN, options.segment_token, reason, f"no mark, or {flat_name('block_size')}")


def find_gaps(token_ids: list[int], mark: int, block_size: int) -> list[tuple[int, int]]:
    """(position, length) of the padding that has each ``mark`` stand at a multiple of ``block_size``.

    None before a mark at the start, nor behind the one token that many tokenizers put there.
    """
    gaps: list[tuple[int, int]] = []
    position = added = 0
    for _ in range(token_ids.count(mark)):
        position = token_ids.index(mark, position)
        length = -(position + added) % block_size
        if length and position > 1:
            gaps.append((position, length))
            added += length
        position += 1
    return gaps


def fill_gaps(token_ids: list[int], gaps: list[tuple[int, int]], padding: int) -> list[int]:
    """The tokens with ``padding`` in each gap, where it was found."""
    filled: list[int] = []
    start = 0
    for position, length in gaps:
        filled += token_ids[start:position]
        filled += [padding] * length
        start = position
    return filled + token_ids[start:]
