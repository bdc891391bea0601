"""Documents of a prompt: their starts and ends (``star_segments``), and their layout on KV pages.

A document starts at each message of a chat, at each text that the client has sent, at each token that the server or the
request names, or at each offset that the request gives. The last one is the query, unless the request says how long the
query is. A document longer than B is cut there. What is before the first document is the head, whose first whole pages
are the anchor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from starling.config.parsing import OptionError
from starling.scheduler.planning.rules import SEGMENTS, Case

NO_CHAT = "the prompt is not a chat that this server has rendered, so that it has no messages"
NOT_ONE_TOKEN = "it is not one token of the model's tokenizer"
NOT_TEXT = "the prompt has images or embeddings, whose positions are not those of a document"


class TooLong(OptionError):
    """A prompt is too long with each of its documents on a KV page."""


@dataclass(frozen=True)
class Documents:
    """The documents of a prompt.

    Attributes:
        starts: where they start, ascending; the head is before the first one.
        why: why the prompt has none although the server's default asks for them, or None if it has or nothing asks.
        mark: the token that starts each, or None.
    """

    starts: Sequence[int] = ()
    why: str | None = None
    mark: int | None = None

    def padding(self, head: int, token_ids: list[int]) -> int:
        """Return the token between documents, which none of the prompt sees.

        It is a token that the prompt has already, so that no penalty of sampling counts another one. And it is the same
        in another order of the documents, since the key of a document's last page contains it.

        Args:
            head: tokens of the head.
        """
        if self.mark is not None:
            return self.mark
        return token_ids[0] if head else token_ids[-1]


NO_DOCUMENTS = Documents()


def find_documents(case: Case) -> Documents:
    """All documents of a prompt, the query included.

    Raises:
        OptionError: the request asks for documents that the prompt can't have.
    """
    known, value = case.prompt.segments, case.options.segments
    if known is not None and known.source == "texts" and value != "off":
        if case.has("segments"):
            raise _refused(case, "each text of the prompt is a document", f"no {SEGMENTS} beside texts")
        refusals = case.engine.document_refusals
        return Documents(why="; ".join(refusals)) if refusals else Documents(known.starts)
    if not case.asks_for_documents:
        reason = case.instead_of_documents
        return Documents(why=None if reason is None else f"no documents: {reason}")
    if case.prompt.token_ids is None:
        return _without(case, NOT_TEXT, "off, or a text-only prompt")
    if isinstance(value, tuple):
        return Documents(_checked_offsets(case, value))
    if value == "auto":
        reason = NO_CHAT if known is None else known.refusal
        if known is None or reason is not None:
            return _without(case, str(reason), "off, token offsets of the prompt, or the text of a token")
        return Documents(known.starts)
    mark = case.engine.token_of(str(value))
    if mark is None:
        raise _refused(case, NOT_ONE_TOKEN, "the text of one token")
    starts = positions_of(mark, case.prompt.token_ids)
    return (
        Documents(starts, None, mark)
        if starts
        else _without(case, f"no {value} is in the prompt", "off, or a text that starts the prompt's documents")
    )


def documents_before(context_end: int, documents: Documents, case: Case) -> Documents:
    """Return the documents of a prompt's context.

    Raises:
        OptionError: the request asks for documents and says how long the query is, and none starts before it.
    """
    starts = documents.starts[: bisect_left(documents.starts, context_end)]
    if documents.starts and not starts and case.has("segments") and case.has("query_tokens"):
        reason = f"no document starts in the context, the first {context_end} tokens of the prompt"
        raise _refused(case, reason, "offsets of the context")
    return replace(documents, starts=starts)


def _refused(case: Case, reason: str, allowed: str) -> OptionError:
    return OptionError(SEGMENTS, case.options.segments, reason, allowed)


def _without(case: Case, reason: str, allowed: str) -> Documents:
    """No documents where the server's default asks for them; raises OptionError where the request does."""
    if case.has("segments"):
        raise _refused(case, reason, allowed)
    return Documents(why=f"no documents: {reason}")


def _checked_offsets(case: Case, offsets: tuple[int, ...]) -> tuple[int, ...]:
    tokens = case.prompt.num_tokens
    if offsets[-1] >= tokens:
        reason = f"the prompt has only {tokens} tokens, and {offsets[-1]} is not one of them"
        raise _refused(case, reason, f"offsets from 0 to {tokens - 1}")
    return offsets


def refuse_many_offsets(value: Any, num_tokens: int) -> None:
    """Refuse more offsets than a prompt has tokens before each of them is looked at (raises OptionError)."""
    if isinstance(value, (list, tuple)) and len(value) > num_tokens:
        reason = f"it has {len(value)} elements, and the prompt has {num_tokens} tokens"
        raise OptionError(SEGMENTS, value, reason, f"offsets from 0 to {num_tokens - 1}")


def positions_of(mark: int, token_ids: list[int]) -> list[int]:
    """Find the indexes of a token in a prompt."""
    return np.flatnonzero(np.asarray(token_ids, dtype=np.int64) == mark).tolist()


def refuse_too_long(padded: int, case: Case, more: str = "") -> None:
    """Refuse a prompt that takes ``padded`` tokens with its padding, or more (raises TooLong)."""
    limit = case.engine.max_prompt_tokens
    if limit is not None and padded > limit:
        tokens = case.prompt.num_tokens
        reason = f"with each document on a KV page of {case.page} tokens the prompt of {tokens} takes {padded}{more}"
        allowed = f"up to {limit} tokens: fewer documents, or smaller pages (--block-size)"
        raise TooLong(SEGMENTS, case.options.segments, reason, allowed)


def cut(starts: Sequence[int], context_end: int, block_size: int) -> list[tuple[int, int]]:
    """(start, end) of each block of a context. The first one is the head, unless a document starts at 0.

    Args:
        starts: where documents start, ascending and below ``context_end``.
        block_size: the most tokens of a block.
    """
    borders = [*starts, context_end]
    head = min(borders[0], block_size)
    pieces = [(0, head)] if head else []
    for start, stop in pairwise(sorted({head, *borders})):
        pieces += [(first, min(first + block_size, stop)) for first in range(start, stop, block_size)]
    return pieces


def lay_out(pieces: list[tuple[int, int]], page_size: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Lay blocks out in the prompt with padding, each at the start of a page, and the query behind them."""
    blocks, start = [], 0
    for first, stop in pieces:
        blocks.append((start, start + stop - first))
        start += -(-(stop - first) // page_size) * page_size
    return tuple(blocks), start
