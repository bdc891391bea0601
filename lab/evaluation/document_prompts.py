"""Prompts of documents with their natural borders: a head, files or notes or passages, and questions about them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from random import Random
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from starling.lab.evaluation.prompts import fit
from starling.lab.evaluation.tasks import TASKS, Example

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

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A question about documents, as token ids.

    Attributes:
        question: the question, with all that stands before the answer.
        answer: the first tokens of the right answer.
        is_recall: True if it asks for a passage, and is no question of the prompt's own.
    """

    question: Tokens
    answer: Tokens
    is_recall: bool = False


@dataclass(frozen=True)
class DocumentPrompt:
    """Documents as token ids, and questions about them.

    Attributes:
        task: task of `starling eval`, or what else the prompt was made by.
        head: tokens that all documents see.
        asked: questions, of which each is asked by itself.
    """

    task: str
    head: Tokens
    documents: tuple[Tokens, ...]
    asked: tuple[Asked, ...]

    @property
    def question(self) -> Tokens:
        """Return the first question."""
        return self.asked[0].question

    @property
    def answer(self) -> Tokens:
        """Return the answer of the first question."""
        return self.asked[0].answer

    @property
    def context(self) -> list[int]:
        """Return the tokens of head and documents."""
        return [*self.head, *(token for document in self.documents for token in document)]

    @property
    def starts(self) -> list[int]:
        """Return the position of the first token of each document."""
        return list(accumulate(map(len, self.documents[:-1]), initial=len(self.head)))


Shape = Literal["passages", "marked", "messages"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
FILE_MARKS = ("<|file_sep|>", "<file_sep>")
"""Tokens with which models for code begin a file."""


@dataclass(frozen=True)
class Style:
    """Style in which an example becomes a prompt.

    Attributes:
        system: message before the documents, or empty if there is none.
        least_tokens: minimum length of a document: shorter pieces are joined.
        answer_tokens: length of an answer.
        shape: documents are passages of one message; each begins with a token of FILE_MARKS; or each is a message.
    """

    system: str = SYSTEM
    least_tokens: int = LEAST_TOKENS
    answer_tokens: int = ANSWER_TOKENS
    shape: Shape = "passages"


@dataclass(frozen=True)
class Layout:
    """The texts around documents and a question.

    Attributes:
        head: before the first document.
        start, end: around each document.
        ask, answer: around the question; the answer follows.
    """

    head: str
    start: str
    end: str
    ask: str
    answer: str


class Encoder:
    """Makes tokens of texts, and of a chat around documents.

    Args:
        tokenizer: a tokenizer of Transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> Tokens:
        """Return the tokens of a text, without special ones."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def layout(self, style: Style, about: str = "") -> Layout:
        """Return the texts around documents, in the style's shape, or as passages where the model has no such shape.

        Args:
            about: subject of the documents.
        """
        if style.shape == "messages" and (found := self._messages(style.system, about)):
            return found
        marks = self._marks if style.shape == "marked" else []
        before, after = self._around(style.system)
        head = before + (f"{about}\n\n" if about else "")
        return Layout(head, start=marks[0] if marks else "", end="", ask="\n\n", answer=after)

    @cached_property
    def _marks(self) -> list[str]:
        known = self.tokenizer.get_vocab()
        return [mark for mark in FILE_MARKS if mark in known]

    def _around(self, system: str) -> tuple[str, str]:
        """Return a chat's text before the user's, and behind it up to the answer. Without a template: little."""
        if not self.tokenizer.chat_template:
            return f"{self.tokenizer.bos_token or ''}{system}\n\n", "\n\n"
        messages = [{"role": "system", "content": system}] if system else []
        before, _, after = self._chat([*messages, {"role": "user", "content": "DOCUMENTS"}], True).partition(
            "DOCUMENTS"
        )
        return before, after

    def _messages(self, system: str, about: str) -> Layout | None:
        """Return the layout of a chat whose documents are messages of the user.

        The result is None if the template does not have them one by one.
        """
        if not (self.tokenizer.chat_template and system):
            return None
        messages = [{"role": "system", "content": f"{system}\n\n{about}".rstrip()}]
        try:
            head = self._chat(messages, False)
            user = [{"role": "user", "content": name} for name in ("DOCUMENT", "QUESTION")]
            chat = self._chat([*messages, *user], True)
        except TemplateError:  # many templates want an answer behind each message
            return None
        start, document, rest = chat.removeprefix(head).partition("DOCUMENT")
        between, question, answer = rest.partition("QUESTION")
        if not (chat.startswith(head) and document and question and start and between.endswith(start)):
            return None
        return Layout(head, start, between.removesuffix(start), start, answer)

    def _chat(self, messages: Sequence[dict[str, str]], answered: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answered)
        return text


def joined(pieces: Sequence[Tokens], least_tokens: int) -> tuple[Tokens, ...]:
    """Join consecutive pieces to documents of at least ``least_tokens`` tokens."""
    documents: list[Tokens] = [()]
    for piece in pieces:
        if len(documents[-1]) >= least_tokens:
            documents.append(())
        documents[-1] += piece
    return tuple(documents)


def as_prompt(examples: Sequence[Example], task: str, encoder: Encoder, style: Style) -> DocumentPrompt:
    """Return examples of one task with one text as documents.

    Each is tokenised by itself, as its KV is computed by itself.
    """
    about, _, rest = examples[0].text.partition("\n\n")
    text = rest.rpartition("\n\n")[0]
    pieces = [encoder.encode(piece) for piece in re.split(BORDERS.get(task, SENTENCES), text) if piece]
    layout = encoder.layout(style, about)
    documents = joined(pieces, style.least_tokens)
    start, end = encoder.encode(layout.start), encoder.encode(layout.end)
    return DocumentPrompt(
        task=task,
        head=encoder.encode(layout.head),
        documents=tuple((*start, *document, *end) for document in documents),
        asked=tuple(
            Asked(
                encoder.encode(
                    f"{layout.ask}{example.text.rpartition(chr(10) * 2)[2]}{layout.answer}{example.answer_prefix}"
                ),
                encoder.encode(example.answer)[: style.answer_tokens],
            )
            for example in examples
        ),
    )


def make_prompt(
    task: str, name: str, tokens: int, encoder: Encoder, style: Style = Style(), questions: int = 1
) -> DocumentPrompt:
    """Make a prompt whose context and question have at most ``tokens`` tokens, and nearly that number.

    It depends on its arguments alone.

    Args:
        name: seed of the random generators.
        questions: maximum number of questions; fewer where the text has fewer.
    """

    def make(size: int, number: int = 0) -> Example:
        return TASKS[task].make(Random(name), size, Random(f"{name}/{number}") if number else None)

    async def measure(example: Example) -> int:
        prompt = as_prompt([example], task, encoder, style)
        return len(prompt.context) + len(prompt.question)

    size, _ = asyncio.run(fit(make, measure, tokens, TASKS[task].least, TASKS[task].least + 8))
    first = make(size)
    found = {first.text: first}
    for number in range(1, questions):
        other = make(size, number)
        if other.text.rpartition("\n\n")[0] == first.text.rpartition("\n\n")[0]:
            found.setdefault(other.text, other)
    return as_prompt(list(found.values()), task, encoder, style)
