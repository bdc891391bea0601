"""Which pages of the documents are computed again, and what it costs to choose them and to compute them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch

from starling.attention_backends.star.reference import Heads
from starling.lab.evaluation.document_prompts import DocumentPrompt

PAGE = 16


@dataclass(frozen=True)
class Page:
    """Tokens [start, end) of the context, the ``index``-th page of their document."""

    start: int
    end: int
    index: int


@dataclass(frozen=True)
class Facts:
    """What the rules choose by.

    Attributes:
        pages: those that can be chosen.
        attention: (layers, KV heads, tokens) of the question's tokens to the context's.
        deviation: (layers, tokens) of the KV from the dense one. A rule that reads all of it is an oracle.
        heads: the retrieval heads.
        seed: of a random choice.
    """

    pages: Sequence[Page]
    attention: torch.Tensor
    deviation: torch.Tensor
    heads: Heads
    seed: str


@dataclass(frozen=True)
class Work:
    """Tokens that pass through all layers, and query-key pairs of a layer, on average over the layers."""

    tokens: float = 0.0
    keys: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.keys + other.keys)

    def __mul__(self, factor: float) -> Work:
        return Work(self.tokens * factor, self.keys * factor)


def work_of(places: torch.Tensor) -> Work:
    """The work of tokens at these positions that see all before them and themselves."""
    return Work(len(places), float((places + 1).sum()))


def documents_work(prompt: DocumentPrompt) -> Work:
    """The work of computing all documents densely: 1 in all shares."""
    return work_of(torch.arange(len(prompt.head), len(prompt.context)))


def question_work(prompt: DocumentPrompt, num_layers: int) -> Work:
    """One pass of the question, so that its attention is known."""
    length = len(prompt.context)
    return work_of(torch.arange(length, length + len(prompt.question)))


def first_layer_work(prompt: DocumentPrompt, num_layers: int) -> Work:
    """The first layer of all documents' tokens, after which the keys and values of the second one are known."""
    return documents_work(prompt) * (1 / num_layers)


def no_work(prompt: DocumentPrompt, num_layers: int) -> Work:
    return Work()


def pages_of(prompt: DocumentPrompt) -> list[Page]:
    """The pages of all documents but the first, which sees all that stands before it already."""
    pages = []
    for start, document in list(zip(prompt.starts, prompt.documents, strict=True))[1:]:
        end = start + len(document)
        pages += [Page(at, min(at + PAGE, end), index) for index, at in enumerate(range(start, end, PAGE))]
    return pages


def page_means(values: torch.Tensor, pages: Sequence[Page]) -> torch.Tensor:
    """(pages,) the mean of each page's tokens."""
    return torch.stack([values[page.start : page.end].mean() for page in pages])


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """(pages,) 0 for the page with the highest score; of equal scores, the earlier page comes first."""
    return (-scores).argsort(stable=True).argsort()


def head_attention(facts: Facts) -> torch.Tensor:
    """(tokens,) the question's attention by the retrieval heads."""
    return torch.stack([facts.attention[head] for head in sorted(facts.heads)]).mean(0)


def by_chance(facts: Facts) -> torch.Tensor:
    rng = Random(facts.seed)
    return torch.tensor([rng.random() for _ in facts.pages])


def by_place(facts: Facts) -> torch.Tensor:
    return torch.tensor([-float(page.index) for page in facts.pages])


def by_attention(facts: Facts) -> torch.Tensor:
    return page_means(facts.attention.mean((0, 1)), facts.pages)


def by_retrieval_heads(facts: Facts) -> torch.Tensor:
    return page_means(head_attention(facts), facts.pages)


def by_heads_and_place(facts: Facts) -> torch.Tensor:
    """Half of the pages by each: the two orders, in turn."""
    first = torch.where(by_place(facts) == 0, by_retrieval_heads(facts), -1.0)
    return -torch.minimum(2 * ranks(by_retrieval_heads(facts)), 2 * ranks(first) + 1)


def by_second_layer(facts: Facts) -> torch.Tensor:
    return page_means(facts.deviation[1], facts.pages)


def by_deviation(facts: Facts) -> torch.Tensor:
    return page_means(facts.deviation.mean(0), facts.pages)


def by_attended_deviation(facts: Facts) -> torch.Tensor:
    return page_means((facts.attention.mean(1) * facts.deviation).mean(0), facts.pages)


@dataclass(frozen=True)
class Rule:
    """How pages are chosen.

    Attributes:
        scores: (pages,), the highest first.
        cost: (prompt, layers) -> the work of one choice.
        passes: repairs; before each, pages are chosen with the KV that the one before has left.
    """

    scores: Callable[[Facts], torch.Tensor]
    cost: Callable[[DocumentPrompt, int], Work] = question_work
    passes: int = 1


RULES = {
    "random": Rule(by_chance, no_work),
    "first tokens of each document": Rule(by_place, no_work),
    "question's attention, all heads": Rule(by_attention),
    "question's attention, retrieval heads": Rule(by_retrieval_heads),
    "the same, two passes": Rule(by_retrieval_heads, passes=2),
    "retrieval heads and first tokens": Rule(by_heads_and_place),
    "KV that deviates in the second layer": Rule(by_second_layer, first_layer_work),
    "KV that deviates (oracle)": Rule(by_deviation, no_work),
    "attention times deviation (oracle)": Rule(by_attended_deviation),
}
"""Name -> rule. An oracle's knowledge of the dense KV is not counted as work."""


def choose(scores: torch.Tensor, pages: Sequence[Page], tokens: int, budget: float) -> torch.Tensor:
    """(tokens,) bool: the tokens of the best pages that have at most ``budget`` tokens together.

    Args:
        scores: (pages,).
        tokens: of the context.
    """
    chosen = torch.zeros(tokens, dtype=torch.bool)
    for page in ranks(scores).argsort().tolist():
        budget -= pages[page].end - pages[page].start
        if budget < 0:
            break
        chosen[pages[page].start : pages[page].end] = True
    return chosen
