"""Prompts of documents with their natural borders: a long head, files or notes or passages, and a question."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

import torch

from starling.evaluation.prompts import fit
from starling.evaluation.tasks import TASKS, Example

TASK_NAMES = ("code", "nth_note", "moves", "vt", "niah_multikey_2", "niah_multivalue", "association")
FILES, NOTES, SENTENCES = r"(?=# file: )", r"(?=Note about )", r"(?<=\.)(?= )"
BORDERS = {"code": FILES, "nth_note": NOTES}
"""Task -> where a document may start; of the other tasks, at a sentence."""

LEAST_TOKENS = 96
ANSWER_TOKENS = 8
SYSTEM = (
    "You answer questions about documents. The user's message begins with what the documents are about. The documents "
    "follow: files of a project, notes, or passages of a text, in their order. Each of them can be read by itself, and "
    "some of them have nothing to do with the question; pass over those. What the answer needs can stand in one "
    "document or in several of them. The question stands behind the last document. Answer from the documents and not "
    "from memory. Answer briefly, and do not explain the answer."
)


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids.

    Attributes:
        task: of `starling eval`.
        head: what all documents see.
        question: with all that stands before the answer.
        answer: the first ANSWER_TOKENS tokens of the right answer.
    """

    task: str
    head: tuple[int, ...]
    documents: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def context(self) -> list[int]:
        """The tokens of head and documents."""
        return [*self.head, *(token for document in self.documents for token in document)]

    @property
    def starts(self) -> list[int]:
        """The position of the first token of each document."""
        return list(accumulate(map(len, self.documents[:-1]), initial=len(self.head)))

    @property
    def number(self) -> torch.Tensor:
        """(context tokens,) 0 for the head's tokens, and 1, 2, ... for those of each document."""
        lengths = torch.tensor([len(self.head), *map(len, self.documents)])
        return torch.arange(len(lengths)).repeat_interleave(lengths)


def joined(pieces: Sequence[list[int]]) -> list[tuple[int, ...]]:
    """The pieces as documents: consecutive ones are joined until a document has LEAST_TOKENS tokens."""
    documents: list[tuple[int, ...]] = [()]
    for piece in pieces:
        if len(documents[-1]) >= LEAST_TOKENS:
            documents.append(())
        documents[-1] += tuple(piece)
    return documents


def as_prompt(example: Example, task: str, tokenizer: Any) -> Prompt:
    """An example of a task as documents. Each is tokenised by itself, as its KV is computed by itself."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    about, _, rest = example.text.partition("\n\n")
    text, _, question = rest.rpartition("\n\n")
    pieces = [encode(piece) for piece in re.split(BORDERS.get(task, SENTENCES), text) if piece]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "DOCUMENTS"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = chat.split("DOCUMENTS")
    return Prompt(
        task=task,
        head=tuple(encode(f"{before}{about}\n\n")),
        documents=tuple(joined(pieces)),
        question=tuple(encode(f"\n\n{question}{after}{example.answer_prefix}")),
        answer=tuple(encode(example.answer)[:ANSWER_TOKENS]),
    )


def make_prompt(task: str, number: int, tokens: int, tokenizer: Any) -> Prompt:
    """A prompt whose context and question have at most ``tokens`` tokens, and nearly so many.

    It depends on its arguments alone.
    """

    def make(size: int) -> Example:
        return TASKS[task].make(Random(f"repair/{task}/{number}"), size)

    async def measure(example: Example) -> int:
        prompt = as_prompt(example, task, tokenizer)
        return len(prompt.context) + len(prompt.question)

    size, _ = asyncio.run(fit(make, measure, tokens, TASKS[task].least, TASKS[task].least + 8))
    return as_prompt(make(size), task, tokenizer)
