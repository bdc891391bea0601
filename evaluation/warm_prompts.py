"""The prompts that compute documents into a library, over HTTP (`starling warm`) and over gRPC (WarmDocuments).

A document is found by its tokens, behind the tokens of the head. So its prompt has to be made as the prompts that will
ask about it: as a chat with the server's template, as a text with a token before each document, or of texts that are
tokenised one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

QUESTION = "?"
OTHER_DOCUMENT, OTHER_QUESTION = "Another document.", "Which one?"
"""Of the prompt that has to find a document."""
CHAT, TEXTS = "auto", "texts"
"""How prompts have their documents; any other word is the text of the token that starts each (``star_segments``)."""
NO_HEAD = "the first message of a chat is its head, and no document: give the head that your chats have"
NO_LIBRARY = "the server has no library (--star-library), and forgets documents when it needs their memory or ends"
NO_FORM = "the server's requests have no documents by default (--star-segments): say how yours have them"
FORMS = "auto (messages of a chat), the text of the token that starts each document, or texts"


def documents_of(document: Any, has_head: bool) -> list[Any]:
    """The documents of a prompt that computes one.

    Without a head the document is in it twice: a prompt of one block would be dense, and its pages no document's.
    """
    return [document] if has_head else [document, document]


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def joined_text(separator: str, head: str, documents: Sequence[str], question: str) -> str:
    """A prompt of text, with a token before each document and the question."""
    return head + "".join(separator + text for text in (*documents, question))


def joined_tokens(
    head: Sequence[int], documents: Sequence[Sequence[int]], question: Sequence[int]
) -> tuple[list[int], list[int]]:
    """A prompt of texts that were tokenised one by one, and where its documents and its question start."""
    tokens, starts = list(head), []
    for part in (*documents, question):
        starts.append(len(tokens))
        tokens += part
    return tokens, starts


def refusal_of_looking_up(answer: dict[str, Any]) -> str | None:
    """Why a prompt of a document and OTHER_DOCUMENT does not find the first; None: it does.

    Args:
        answer: of a look-up: ``plan``, and for each replica ``documents`` (scheduler/cached_tokens.py).
    """
    if not answer["replicas"] or not answer["replicas"][0]["documents"]:
        return f"a prompt with it has no documents: {answer['plan'].get('why', answer['plan'].get('attention'))}"
    tokens, cached = max(map(tokens_of_first, answer["replicas"]), key=lambda counts: counts[1])
    return None if cached == tokens else f"another prompt finds only {cached} of its {tokens} tokens"


def tokens_of_first(replica: dict[str, Any]) -> tuple[int, int]:
    """(tokens, those that are cached) of all documents but OTHER_DOCUMENT: a long one is cut into several."""
    blocks = replica["documents"][:-1]
    return sum(block["tokens"] for block in blocks), sum(block["cached_tokens"] for block in blocks)


async def in_parallel(work: Callable[[], Coroutine[Any, Any, None]], concurrency: int) -> None:
    """Run so many of these at once; where one fails, all end (raises its exception)."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
