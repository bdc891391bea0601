"""What a task is: a pure function from a random generator and a size to a text, a question and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

Match = Literal["all", "any"]
"""How an output is scored: the share of references that it contains, or whether it contains one of them."""


@dataclass(frozen=True)
class Example:
    """One prompt of a task.

    Attributes:
        text: the context, and the question behind it.
        answer_prefix: the words with which the answer begins; they are given to the model.
        references: the strings that a right answer contains.
        separator: what stands between them in a right answer.
        depth: where in ``text`` the fact begins that the answer needs (``depth_of``); None where there are several
            facts, or the whole text is needed.
    """

    text: str
    answer_prefix: str
    references: tuple[str, ...]
    separator: str = ", "
    depth: float | None = None

    @property
    def answer(self) -> str:
        """The right answer as the model would continue ``answer_prefix``."""
        return " " + self.separator.join(self.references)


class MakeExample(Protocol):
    """Makes an example. A larger size gives a longer text.

    The same states of the generators and the same size give the same example. ``ask`` chooses the question where a text
    has several: with another state, the question is another one about the same text. None: ``rng`` chooses it.
    """

    def __call__(self, rng: Random, size: int, ask: Random | None = None) -> Example: ...


@dataclass(frozen=True)
class Task:
    """A family of prompts of any length.

    Attributes:
        name: for --tasks.
        make: makes an example.
        least: the smallest size.
        max_tokens: of an answer.
        measures: what the task measures, in a line.
        source: whose definition it follows.
    """

    name: str
    make: MakeExample
    least: int
    max_tokens: int
    measures: str
    source: str


def depth_of(text: str, fact: str) -> float:
    """Where a fact begins that stands in a text once, in characters: 0 at the beginning, towards 1 at the end."""
    return text.index(fact) / len(text)


def hide(rng: Random, sentences: Sequence[str], needles: Sequence[str]) -> str:
    """The sentences as one text, with each needle at a random place between them; the needles keep their order."""
    places = sorted(rng.randint(0, len(sentences)) for _ in needles)
    pieces: list[str] = []
    start = 0
    for place, needle in zip(places, needles, strict=True):
        pieces += [*sentences[start:place], needle]
        start = place
    return " ".join([*pieces, *sentences[start:]])
