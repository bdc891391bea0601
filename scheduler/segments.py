"""Segments that a client marks in its prompt, moved to star blocks' borders: then an edit shifts no other segment.

What is put before each is tokens of the prompt like others, seen by their own block, the query and the output: white
space, of which a model makes nothing.
"""

from __future__ import annotations

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
        white_space: the token to pad with where no option says it; None: one has to.
    """

    prompt: int
    vocabulary: int
    white_space: int | None


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
    if mark not in token_ids[:context_end]:
        if "segment_token" in given:
            reason = f"it does not occur in the context, the first {context_end} tokens of the prompt"
            raise OptionError(SEGMENT_TOKEN, mark, reason, "a token that starts the prompt's segments")
        return token_ids, request
    padding = limits.white_space if options.padding_token is None else options.padding_token
    if padding is None:
        reason = (
            f"{SEGMENT_TOKEN}={mark} needs it, as the model's tokenizer has no token for a space, nor for a line break"
        )
        raise OptionError(PADDING_TOKEN, None, reason, "the id of a token that says nothing")
    block_size = find_block_size(options, len(token_ids), page)
    context = pad_segments(token_ids[:context_end], mark, padding, block_size)
    aligned = context + token_ids[context_end:]
    if len(aligned) > max(len(token_ids), limits.prompt):
        reason = f"with its segments at star blocks' borders the prompt of {len(token_ids)} tokens has {len(aligned)}"
        raise OptionError(
            SEGMENT_TOKEN, mark, reason, f"up to {limits.prompt} tokens: smaller blocks or fewer segments"
        )
    there = {"query_tokens": None, "context_tokens": len(context)}
    return aligned, (request or parse_options({}, flat=True)).model_copy(update=there)


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


def pad_segments(token_ids: list[int], mark: int, padding: int, block_size: int) -> list[int]:
    """Put ``padding`` before each ``mark``, until it stands at a multiple of ``block_size``."""
    padded: list[int] = []
    start = 0
    for _ in range(token_ids.count(mark)):
        stop = token_ids.index(mark, start)
        padded += token_ids[start:stop]
        padded += [padding] * (-len(padded) % block_size)
        padded.append(mark)
        start = stop + 1
    return padded + token_ids[start:]
