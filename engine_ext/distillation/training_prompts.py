"""The prompts that an adapter is trained on: tasks of `starling eval`, text that comes with Python, or the user's own.

Beside its own questions, each prompt is asked for passages of its documents. So a context that is computed once is read
by several questions, and a prompt without an answer teaches too.
"""

from __future__ import annotations

import inspect
import pydoc_data.topics
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from starling.evaluation.document_prompts import (
    SYSTEM,
    Asked,
    DocumentPrompt,
    Encoder,
    Style,
    Tokens,
    make_prompt,
)
from starling.evaluation.prompts import TooLong

TEXT = "text"
TRAINED_TASKS = (
    *("code", "moves", "vt", "association", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
)
SYSTEMS = (
    SYSTEM,
    "You are a helpful assistant.",
    "Answer from the documents, briefly.",
    "The user sends documents and a question about them. Read them all before you answer, in a few words.",
)
PIECES = (48, 96, 192)
"""The least tokens of a document, of which a prompt has one."""
SOURCES = (
    "argparse",
    "ast",
    "calendar",
    "configparser",
    "csv",
    "datetime",
    "fractions",
    "gettext",
    "imaplib",
    "mailbox",
)
"""Modules of the standard library whose code is text to train on."""
RECALLED_WORDS, PHRASE_WORDS, RECALLED_TOKENS = 6, 5, 20
GOES_ON = (
    'Repeat word for word what follows "{phrase}".',
    'How does the text go on behind "{phrase}"?',
    'Quote the passage that begins with "{phrase}".',
    "Continue: {phrase}",
)
BEFORE, BEGINS = 'What stands before "{phrase}"?', "Repeat the beginning of document {number} of {count}."
"""Questions for passages: how a text goes on, in several words; what stands before it; and how a document begins."""


@lru_cache(maxsize=1)
def python_texts() -> tuple[str, ...]:
    """Passages of Python's documentation of its language, and of the code of its library."""
    texts = [*pydoc_data.topics.topics.values()]
    for name in SOURCES:
        texts.append(inspect.getsource(__import__(name)))
    passages = []
    for text in texts:
        parts = re.split(r"\n\n+", text)
        passage = ""
        for part in parts:
            passage += part + "\n\n"
            if len(passage) > 800:
                passages.append(passage[:1600])
                passage = ""
    return tuple(passages)


def recalls(documents: Sequence[Tokens], encoder: Encoder, after: str, rng: Random, count: int) -> list[Asked]:
    """So many questions for passages of the documents, or fewer where these are of a few words.

    Args:
        after: what a prompt has between a question and its answer.
    """
    found: list[Asked] = []
    for _ in range(2 * count):
        if len(found) == count:
            break
        number = rng.randrange(len(documents))
        text = encoder.tokenizer.decode(documents[number])
        words = list(re.finditer(r"\S+", text))
        if len(words) < PHRASE_WORDS + RECALLED_WORDS:
            continue
        first = rng.randrange(len(words) - PHRASE_WORDS - RECALLED_WORDS + 1)
        start, end = words[first].start(), words[first + PHRASE_WORDS - 1].end()
        kind = rng.choice((*GOES_ON, BEFORE, BEGINS))
        phrase, begin, answer = text[start:end], "", text[start:]
        if kind == BEGINS:
            answer = text[words[0].start() :]
        elif kind == BEFORE:
            phrase = text[words[first + RECALLED_WORDS].start() : words[first + RECALLED_WORDS + 4].end()]
            answer = text[start : words[first + RECALLED_WORDS - 1].end()]
        elif rng.random() < 0.5:  # the answer goes on behind the phrase
            begin, answer = phrase, text[end:]
        question = kind.format(phrase=phrase, number=number + 1, count=len(documents))
        tokens = encoder.encode(f"\n\n{question}{after}{begin}"), encoder.encode(answer)[:RECALLED_TOKENS]
        found.append(Asked(*tokens, is_recall=True))
    return found


def with_recalls(prompt: DocumentPrompt, encoder: Encoder, system: str, rng: Random, questions: int) -> DocumentPrompt:
    """The prompt with so many questions: beside its own, for passages of its documents."""
    more = recalls(prompt.documents, encoder, encoder.around(system)[1], rng, questions - len(prompt.asked))
    return replace(prompt, asked=(*prompt.asked, *more)) if more else prompt


@dataclass(frozen=True)
class TaskPrompts:
    """Prompts of tasks and of plain text, by number.

    Attributes:
        tokens: (least, most) of a prompt's context and first question.
        questions: of a context.
    """

    encoder: Encoder
    tasks: tuple[str, ...]
    tokens: tuple[int, int]
    questions: int
    seed: str

    def make(self, number: int, kind: str | None = None) -> DocumentPrompt:
        """The prompt of a number; it depends on the arguments and the attributes alone.

        Args:
            kind: a task, or TEXT; None: one of all.
        """
        rng = Random(f"{self.seed}/{number}")
        kind = kind or rng.choice((*self.tasks, *[TEXT] * max(len(self.tasks) // 3, 1)))
        tokens = rng.randint(*self.tokens)
        style = Style(rng.choice(SYSTEMS), rng.choice(PIECES), RECALLED_TOKENS)
        name = f"{self.seed}/{number}/{kind}"
        if kind == TEXT:
            prompt = self.text_prompt(name, tokens, style, rng)
        else:
            prompt = self.task_prompt(kind, name, tokens, style)
        return with_recalls(prompt, self.encoder, style.system, rng, self.questions)

    def task_prompt(self, task: str, name: str, tokens: int, style: Style) -> DocumentPrompt:
        """A prompt of a task with so many tokens, or with the most, where the task has none so short."""
        try:
            return make_prompt(task, name, tokens, self.encoder, style, self.questions)
        except TooLong as error:
            if tokens == self.tokens[1]:
                raise ValueError(f"tokens={tokens} is too short for {task}: {error}") from None
            return self.task_prompt(task, name, self.tokens[1], style)

    def text_prompt(self, name: str, tokens: int, style: Style, rng: Random) -> DocumentPrompt:
        """Passages of text that comes with Python; another passage stands where the question would."""
        before, _ = self.encoder.around(style.system)
        head = self.encoder.encode(before)
        documents: list[Tokens] = []
        while sum(map(len, documents)) < tokens - len(head):
            documents.append(self.encoder.encode(rng.choice(python_texts()))[: rng.choice((100, 200, 400))])
        passage = self.encoder.encode("\n\n" + rng.choice(python_texts()))[:48]
        return DocumentPrompt(TEXT, head, tuple(documents), (Asked(passage[:24], passage[24:]),))
