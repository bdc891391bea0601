"""Definition of a task: a pure function from a random generator and a size to a text, a question and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

Match = Literal["all", "any"]
"""Score of an output: the share of references that it contains, or whether it contains one of them."""


@dataclass(frozen=True)
class Example:
    """One prompt of a task.

    Attributes:
        text: the context, and the question behind it.
        answer_prefix: the words with which the answer begins; they are given to the model.
        references: the strings that a right answer contains.
        separator: text between them in a right answer.
        depth: place in ``text`` where the fact begins that the answer needs (``depth_of``), or None where there are
            several facts, or the whole text is needed.
    """

    text: str
    answer_prefix: str
    references: tuple[str, ...]
    separator: str = ", "
    depth: float | None = None

    @property
    def answer(self) -> str:
        """Return the right answer as the model would continue ``answer_prefix``."""
        return " " + self.separator.join(self.references)


class MakeExample(Protocol):
    """Makes an example. A larger size gives a longer text.

    The same states of the generators and the same size give the same example. ``ask`` chooses the question where a text
    has several: with another state, the question is another one about the same text. With None, ``rng`` chooses it.
    """

    def __call__(self, rng: Random, size: int, ask: Random | None = None) -> Example: ...


@dataclass(frozen=True)
class Task:
    """A family of prompts of any length.

    Attributes:
        name: name for --tasks.
        make: function that makes an example.
        least: the smallest size.
        max_tokens: maximum tokens of an answer.
        measures: line that says what the task measures.
        source: source of the definition that it follows.
    """

    name: str
    make: MakeExample
    least: int
    max_tokens: int
    measures: str
    source: str


def depth_of(text: str, fact: str) -> float:
    """Return where a fact begins that a text has once, in characters: 0 at the beginning, towards 1 at the end."""
    return text.index(fact) / len(text)


def hide(rng: Random, sentences: Sequence[str], needles: Sequence[str]) -> str:
    """Return the sentences as one text, with each needle at a random place between them, in the needles' order."""
    places = sorted(rng.randint(0, len(sentences)) for _ in needles)
    pieces: list[str] = []
    start = 0
    for place, needle in zip(places, needles, strict=True):
        pieces += [*sentences[start:place], needle]
        start = place
    return " ".join([*pieces, *sentences[start:]])
