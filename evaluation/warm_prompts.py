"""The prompts that compute documents into a library, over HTTP (`starling warm`) and over gRPC (WarmDocuments)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

QUESTION = "?"


def warm_prompt(head: list[int], document: list[int], question: list[int]) -> tuple[list[int], list[int]]:
    """The tokens of a document's prompt, and where its documents and its question start.

    Without a head the document is in it twice: a prompt of one block would be dense, and its pages no document's.
    """
    documents = [document] if head else [document, document]
    starts = [len(head) + number * len(document) for number in range(len(documents) + 1)]
    return [*head, *(token for each in documents for token in each), *question], starts


async def in_parallel(work: Callable[[], Coroutine[Any, Any, None]], concurrency: int) -> None:
    """Run so many of these at once; where one fails, all end (raises its exception)."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
