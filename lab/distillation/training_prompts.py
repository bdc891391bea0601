"""The prompts that an adapter is trained on: tasks of `starling eval`, text that comes with Python, or the user's own.

That text is passages, and documentation of functions, which are asked for by what they do. The user's own prompts are
texts with a separator, or chats.

Beside its own questions, each prompt is asked for passages of its documents. So a context that is computed once is read
by several questions, and a prompt without an answer teaches too.
"""

from __future__ import annotations

import importlib
import inspect
import pydoc_data.topics
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from starling.engine_ext.front.planning import only_token
from starling.lab.distillation.adapted_model import AdaptedModel
from starling.lab.evaluation.document_prompts import (
    SHAPES,
    SYSTEM,
    Asked,
    DocumentPrompt,
    Encoder,
    Layout,
    Style,
    Tokens,
    make_prompt,
)
from starling.lab.evaluation.prompts import OwnPrompt, TooLong, read_own_prompts
from starling.lab.models import ModelError
from starling.scheduler.planning.documents import NOT_ONE_TOKEN, positions_of

TEXT, FUNCTIONS = "text", "functions"
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
DOCUMENTED = (
    *("binascii", "cmath", "codecs", "contextlib", "dataclasses", "dis", "filecmp", "gc", "gzip", "importlib.util"),
    *("io", "linecache", "logging", "mimetypes", "os", "os.path", "pickle", "pkgutil", "platform", "plistlib"),
    *("select", "signal", "socket", "stat", "string", "struct", "sys", "sysconfig", "threading", "time", "tokenize"),
    *("unicodedata", "urllib.parse", "warnings", "weakref", "zipfile", "zlib", "ast", "asyncio", "csv", "email.utils"),
)
"""Modules of the standard library whose functions are asked for."""

WHICH = (
    "What is the name of the function that does this: {sentence}?",
    "Name the function with this description: {sentence}",
    "Which of the functions fits? {sentence}",
)
WHAT = ("What does {name} do?", "Describe {name} in a sentence.")
FUNCTIONS_OF_A_DOCUMENT = (1, 2, 4)
RECALLED_WORDS, PHRASE_WORDS, RECALLED_TOKENS = 6, 5, 20
GOES_ON = (
    'Repeat word for word what follows "{phrase}".',
    'How does the text go on behind "{phrase}"?',
    'Quote the passage that begins with "{phrase}".',
    "Continue: {phrase}",
)
BEFORE, BEGINS = 'What stands before "{phrase}"?', "Repeat the beginning of document {number} of {count}."
SEVERAL = 'What stands behind "{phrase}", and what behind "{other}"?'
"""Questions for passages: how a text goes on, in several words; what stands before it; how a document begins; and how
two texts go on."""
OWN = "own"
ALLOWED = "chats of three messages or more, or texts with --segments TEXT before each document and before the question"


@lru_cache(maxsize=1)
def python_texts() -> tuple[str, ...]:
    """Return passages of Python's documentation of its language, and of the code of its library."""
    texts = [*pydoc_data.topics.topics.values()]
    for name in SOURCES:
        texts.append(inspect.getsource(importlib.import_module(name)))
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


@lru_cache(maxsize=1)
def documented_functions() -> tuple[tuple[str, str, str], ...]:
    """Return (name, first sentence of its documentation, the documentation with the signature) of functions."""
    found = []
    for module in DOCUMENTED:
        for name, member in inspect.getmembers(importlib.import_module(module), inspect.isroutine):
            documentation = inspect.getdoc(member) or ""
            sentence = re.split(r"\.\s|\n\n", " ".join(documentation.split("\n\n")[0].split()))[0].rstrip(".")
            if name.startswith("_") or not 20 <= len(sentence) <= 160 or name in sentence:
                continue
            try:
                signature = str(inspect.signature(member))
            except ValueError:  # some functions written in C have none
                signature = "(...)"
            found.append((name, sentence, f"{module}.{name}{signature}\n{documentation}"[:600] + "\n"))
    return tuple(found)


def recalls(documents: Sequence[Tokens], encoder: Encoder, layout: Layout, rng: Random, count: int) -> list[Asked]:
    """Return ``count`` questions for passages of the documents, or fewer where these are of a few words."""
    before, behind = (len(encoder.encode(text)) for text in (layout.start, layout.end))

    def spot() -> tuple[int, list[str]]:
        """Return a document's number, and its words, with the space before each, from one of them on."""
        number = rng.randrange(len(documents))
        tokens = documents[number][before : len(documents[number]) - behind]
        words = re.findall(r"\s*\S+", encoder.tokenizer.decode(tokens, skip_special_tokens=True))
        first = rng.randrange(max(len(words) - PHRASE_WORDS - RECALLED_WORDS + 1, 1))
        return number, words[0 if kind == BEGINS else first :]

    found: list[Asked] = []
    for _ in range(2 * count):
        if len(found) == count:
            break
        kind = rng.choice((*GOES_ON, BEFORE, BEGINS, SEVERAL))
        spots = [spot() for _ in range(2 if kind == SEVERAL else 1)]
        if any(len(words) < PHRASE_WORDS + RECALLED_WORDS for _, words in spots):
            continue
        number, words = spots[0]
        phrases, begin, answer = [_text(each[:PHRASE_WORDS]) for _, each in spots], "", _text(words)
        if kind == BEFORE:
            phrases = [_text(words[RECALLED_WORDS:][:PHRASE_WORDS])]
            answer = _text(words[:RECALLED_WORDS])
        elif kind == SEVERAL:
            answer = "; ".join(_text(each[PHRASE_WORDS:][:RECALLED_WORDS]) for _, each in spots)
        elif kind != BEGINS and rng.random() < 0.5:  # the answer goes on behind the phrase
            begin, answer = phrases[0], "".join(words[PHRASE_WORDS:])
        question = kind.format(phrase=phrases[0], other=phrases[-1], number=number + 1, count=len(documents))
        tokens = encoder.encode(f"{layout.ask}{question}{layout.answer}{begin}")
        found.append(Asked(tokens, encoder.encode(answer)[:RECALLED_TOKENS], is_recall=True))
    return found


def _text(words: Sequence[str]) -> str:
    return "".join(words).lstrip()


def with_recalls(prompt: DocumentPrompt, encoder: Encoder, style: Style, rng: Random, questions: int) -> DocumentPrompt:
    """Return the prompt with ``questions`` questions: beside its own, for passages of its documents."""
    more = recalls(prompt.documents, encoder, encoder.layout(style), rng, questions - len(prompt.asked))
    return replace(prompt, asked=(*prompt.asked, *more)) if more else prompt


@dataclass(frozen=True)
class TaskPrompts:
    """Prompts of tasks and of plain text, by number.

    Attributes:
        tokens: (least, most) tokens of a prompt's context and first question.
        questions: number of questions of a context.
    """

    encoder: Encoder
    tasks: tuple[str, ...]
    tokens: tuple[int, int]
    questions: int
    seed: str

    def make(self, number: int, kind: str | None = None) -> DocumentPrompt:
        """Make the prompt of a number; it depends on the arguments and the attributes alone.

        Args:
            kind: a task, TEXT or FUNCTIONS, or None for one of all.
        """
        rng = Random(f"{self.seed}/{number}")
        more = max(len(self.tasks) // 4, 1)
        kind = kind or rng.choice((*self.tasks, *[TEXT] * more, *[FUNCTIONS] * more))
        tokens = rng.randint(*self.tokens)
        style = Style(rng.choice(SYSTEMS), rng.choice(PIECES), RECALLED_TOKENS, rng.choice(SHAPES))
        name = f"{self.seed}/{number}/{kind}"
        if kind == TEXT:
            prompt = self.text_prompt(tokens, style, rng)
        elif kind == FUNCTIONS:
            prompt = self.functions_prompt(tokens, style, rng)
        else:
            prompt = self.task_prompt(kind, name, tokens, style)
        return with_recalls(prompt, self.encoder, style, rng, self.questions)

    def task_prompt(self, task: str, name: str, tokens: int, style: Style) -> DocumentPrompt:
        """Make a prompt of a task with ``tokens`` tokens, or with the maximum, where the task has none so short."""
        try:
            return make_prompt(task, name, tokens, self.encoder, style, self.questions)
        except TooLong as error:
            if tokens == self.tokens[1]:
                raise ValueError(f"tokens={tokens} is too short for {task}: {error}") from None
            return self.task_prompt(task, name, self.tokens[1], style)

    def text_prompt(self, tokens: int, style: Style, rng: Random) -> DocumentPrompt:
        """Return passages of text that comes with Python; another passage stands where the question would."""
        layout = self.encoder.layout(style)
        head, start, end = map(self.encoder.encode, (layout.head, layout.start, layout.end))
        documents: list[Tokens] = []
        while sum(map(len, documents)) < tokens - len(head):
            passage = self.encoder.encode(rng.choice(python_texts()))[: rng.choice((100, 200, 400))]
            documents.append((*start, *passage, *end))
        asked = self.encoder.encode(layout.ask + rng.choice(python_texts()))[:48]
        return DocumentPrompt(TEXT, head, tuple(documents), (Asked(asked[:24], asked[24:]),))

    def functions_prompt(self, tokens: int, style: Style, rng: Random) -> DocumentPrompt:
        """Return documentation of functions of Python's library, at most all.

        A function is asked for, or what it does.
        """
        encode, layout = self.encoder.encode, self.encoder.layout(style)
        functions = rng.sample(documented_functions(), len(documented_functions()))
        head = encode(layout.head)
        documents: list[Tokens] = []
        asked: list[Asked] = []
        while functions and sum(map(len, documents)) < tokens - len(head):
            count = rng.choice(FUNCTIONS_OF_A_DOCUMENT)
            chosen, functions = functions[:count], functions[count:]
            documents.append(encode(f"{layout.start}{''.join(text for *_, text in chosen)}{layout.end}"))
            name, sentence, _ = rng.choice(chosen)
            pairs = ((rng.choice(WHICH), name), (rng.choice(WHAT), sentence))
            question, answer = pairs[rng.random() < 1 / 3]
            text = f"{layout.ask}{question.format(name=name, sentence=sentence)}{layout.answer}"
            asked.append(Asked(encode(text), encode(answer)[: style.answer_tokens]))
        rng.shuffle(asked)
        return DocumentPrompt(FUNCTIONS, head, tuple(documents), tuple(asked[: max(self.questions // 2, 1)]))


def read_prompts(
    path: Path, segments: str | None, encoder: Encoder, answer_tokens: int, questions: int
) -> list[DocumentPrompt]:
    """Read the prompts of a file, in an order that does not follow the file's.

    Lines with the same documents are one prompt, so that a training step computes the documents once.

    Args:
        segments: text of the token that starts a document, or None if prompts are chats.
        answer_tokens: length of an answer. Where a line has none, the answer is empty.
        questions: maximum number of questions of a prompt.

    Raises:
        ValueError: the file can't be read, or a prompt has no documents.
    """
    mark = None if segments is None else only_token(encoder.tokenizer, segments)
    if segments is not None and mark is None:
        raise ModelError(f"segments={segments!r} is refused: {NOT_ONE_TOKEN}")
    prompts = [prompt_of(own, line, mark, encoder, answer_tokens) for line, own in read_own_prompts(path)]
    asked: dict[tuple[Tokens, tuple[Tokens, ...]], list[Asked]] = {}
    for prompt in prompts:
        asked.setdefault((prompt.head, prompt.documents), []).extend(prompt.asked)
    contexts = [*asked.items()]
    random.Random(OWN).shuffle(contexts)
    return [
        DocumentPrompt(OWN, head, documents, tuple(every[first : first + questions]))
        for (head, documents), every in contexts
        for first in range(0, len(every), questions)
    ]


def with_answers(prompt: DocumentPrompt, model: AdaptedModel, tokens: int, end: int | None) -> DocumentPrompt:
    """Return the prompt, with the model's own answers by dense attention where it has none.

    Args:
        tokens: length of an answer, which ends earlier behind an ``end`` of the model's.
    """
    open_ones = [asked.question for asked in prompt.asked if not asked.answer]
    if not open_ones:
        return prompt
    answers = iter(model.answers(prompt.context, open_ones, tokens, end))
    asked = [one if one.answer else replace(one, answer=next(answers)) for one in prompt.asked]
    return replace(prompt, asked=tuple(asked))


def prompt_of(own: OwnPrompt, line: int, mark: int | None, encoder: Encoder, answer_tokens: int) -> DocumentPrompt:
    """Make the prompt of a line of the user's file (raises ModelError: it has no documents)."""
    if own.messages is not None:
        ids, starts = chat_segments(own.messages, encoder)
    else:
        ids = list(encoder.tokenizer(own.prompt)["input_ids"])
        starts = [] if mark is None else positions_of(mark, ids)
    if len(starts) < 2:
        raise ModelError(f"line {line} is refused: it has no documents before its question. Allowed: {ALLOWED}")
    pieces = [tuple(ids[start:stop]) for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
    text = ", ".join(own.references)
    goes_on = own.prompt is not None and not own.prompt[-1:].isspace()
    answer = encoder.encode(f" {text}" if goes_on else text)[:answer_tokens] if text else ()
    return DocumentPrompt(OWN, tuple(ids[: starts[0]]), tuple(pieces[:-1]), (Asked(pieces[-1], answer),))


def chat_segments(messages: Sequence[Any], encoder: Encoder) -> tuple[list[int], list[int]]:
    """Return the tokens of a chat, and where each message but the first starts, as with a server's star_segments=auto.

    Raises:
        ModelError: there is no chat template, or it does not render the first messages as the chat's beginning.
    """
    tokenizer = encoder.tokenizer
    if not tokenizer.chat_template:
        raise ModelError("the model has no chat template. Allowed: texts with --segments TEXT")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: Tokens = tuple(encoded["input_ids"])
    token_at = {start: index for index, (start, _) in reversed([*enumerate(encoded["offset_mapping"])])}
    starts = []
    for number in range(1, len(messages)):
        before = tokenizer.apply_chat_template(list(messages[:number]), tokenize=False)
        if text.startswith(before) and len(before) in token_at:
            starts.append(token_at[len(before)])
    return list(ids), starts
