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
"""Texts of the second prompt, which has to find a document of the first one."""
CHAT, TEXTS = "auto", "texts"
"""Marks of where documents start; any other word is the text of the token that starts each (``star_segments``)."""
NO_HEAD = "the first message of a chat is its head, and no document: give the head that your chats have"
NO_LIBRARY = "the server has no library (--star-library), and forgets documents when it needs their memory or ends"
NO_FORM = "the server's requests have no documents by default (--star-segments): say how yours have them"
FORMS = "auto (messages of a chat), the text of the token that starts each document, or texts"


def documents_of(document: Any, has_head: bool) -> list[Any]:
    """Return the documents of a prompt that computes one.

    Without a head the document is in it twice: a prompt of one block would be dense, and its pages no document's.
    """
    return [document] if has_head else [document, document]


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def joined_text(separator: str, head: str, documents: Sequence[str], question: str) -> str:
    """Return a prompt of text, with a token before each document and the question."""
    return head + "".join(separator + text for text in (*documents, question))


def joined_tokens(
    head: Sequence[int], documents: Sequence[Sequence[int]], question: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return a prompt of texts that were tokenised one by one, and where its documents and its question start."""
    tokens, starts = list(head), []
    for part in (*documents, question):
        starts.append(len(tokens))
        tokens += part
    return tokens, starts


def tokens_found(answer: dict[str, Any]) -> int:
    """Return the number of tokens of a document, all of which a prompt of it and OTHER_DOCUMENT finds.

    Args:
        answer: response of a look-up: ``plan``, and for each replica ``documents`` (features/reuse/core.py).

    Raises:
        ValueError: it does not find them, and why.
    """
    if not answer["replicas"] or not answer["replicas"][0]["documents"]:
        reason = answer["plan"].get("why", answer["plan"].get("attention"))
        raise ValueError(f"a prompt with it has no documents: {reason}")
    blocks = [replica["documents"][:-1] for replica in answer["replicas"]]  # a long document is cut into several
    tokens = sum(block["tokens"] for block in blocks[0])
    cached = max(sum(block["cached_tokens"] for block in of_replica) for of_replica in blocks)
    if cached < tokens:
        raise ValueError(f"another prompt finds only {cached} of its {tokens} tokens")
    return tokens


async def in_parallel(work: Callable[[], Coroutine[Any, Any, None]], concurrency: int) -> None:
    """Run ``concurrency`` of these at once; where one fails, all end (raises its exception)."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
