"""The prompts, plans and answers that the machine draws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from hypothesis import strategies as st

from starling.scheduler.planning.plan import StarPlan
from starling.scheduler.planning.request_metadata import PageFetch, PageSource, PromptPart, RequestMetadata
from tests.unit.scheduler.simulation import random_ids
from tests.unit.scheduler.stateful.cases import STOP
from tests.unit.scheduler.stateful.setup import MAX_TOKENS, PAGE_SIZE

MAX_ANSWERS = 30
DOCUMENTS = [
    random_ids(0, MAX_TOKENS),
    random_ids(1, MAX_TOKENS),
    (random_ids(2, 16) * MAX_TOKENS)[:MAX_TOKENS],  # star blocks with equal tokens
    [token for seed in range(MAX_TOKENS) for token in (random_ids(3, 8) + random_ids(seed, 8))][:MAX_TOKENS],  # alike
]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a star plan: of blocks, anchor and overlap in pages, and of the query in tokens.

    With ``gap``, blocks are documents, and the last page of each one ends with up to so many slots of
    padding.
    """

    block: int
    anchor: int
    overlap: int
    query: int
    gap: int | None

    def plan(self, num_tokens: int, own_positions: bool = False) -> StarPlan:
        """The plan of a prompt of so many tokens, its padding included."""
        pages = (num_tokens - self.query) // PAGE_SIZE
        if own_positions and self.gap is not None and pages > self.block:
            return self._own_positions(self.gap, pages, num_tokens)
        sizes = (size * PAGE_SIZE for size in (self.block, min(self.anchor, self.block), min(self.overlap, self.block)))
        return StarPlan(*sizes, max(num_tokens - self.query, 1), num_tokens)

    def _own_positions(self, gap: int, pages: int, num_tokens: int) -> StarPlan:
        borders = [*range(0, pages, self.block), pages]
        blocks = tuple(
            (start * PAGE_SIZE, stop * PAGE_SIZE - number % (gap + 1))
            for number, (start, stop) in enumerate(pairwise(borders))
        )
        anchor = min(self.anchor, (blocks[0][1]) // PAGE_SIZE) * PAGE_SIZE
        return StarPlan(
            self.block * PAGE_SIZE, anchor, 0, pages * PAGE_SIZE, num_tokens, documents=blocks, padding_token=0
        )

    def independent_plan(self, num_tokens: int) -> StarPlan:
        return replace(self.plan(num_tokens), overlap_size=0)


FIELDS = {
    "block": st.sampled_from([2, 3, 4, 6]),
    "anchor": st.sampled_from([6, 0, 0, 1, 2]),
    "overlap": st.sampled_from([0, 0, 0, 0, 1, 6]),
    "query": st.sampled_from([1, 7, 8, 30]),
    "gap": st.sampled_from([None, None, 0, PAGE_SIZE - 1]),
}


@st.composite
def pairs_of_sizes(draw) -> list[Sizes]:
    """The sizes that the plans of a run have, which differ in one field at most."""
    first = draw(st.builds(Sizes, **FIELDS))
    field = draw(st.sampled_from(list(FIELDS)))
    return [first, replace(first, **{field: draw(FIELDS[field])})]


@dataclass(frozen=True)
class Prompt:
    """The start of a document, with other tokens at some places."""

    document: int
    length: int
    edits: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        ids = DOCUMENTS[self.document][: self.length]
        for place in self.edits:
            ids[place % self.length] = 251
        return ids


prompts = st.builds(
    Prompt,
    document=st.sampled_from([0, 0, 1, 2, 3]),
    length=st.sampled_from([5, 40, 64, 100, 129, 129, MAX_TOKENS - MAX_ANSWERS]),
    edits=st.sampled_from([(), (20,), (45,), (3, 70), (100,)]),
)


@dataclass(frozen=True)
class Options:
    """What a request asks beside its tokens; ``seeds`` are those of its parallel samples."""

    salt: str | None
    adapter: int
    priority: int
    grammar: bool
    seeds: tuple[int, ...]
    num_answers: int
    stops_at: int
    session: str | None
    retention: str | None

    def retained(self, plan: StarPlan | None) -> str | tuple[str, ...] | None:
        """What the request says of its pages: of documents one word after the other."""
        words = ("high", "low", "normal")
        number = 0 if plan is None else len(plan.documents_behind_head)
        if self.retention == "each":
            return tuple(words[index % 3] for index in range(number)) or None
        return self.retention

    def answers(self, seed: int) -> list[int]:
        tokens = [(seed * 50 + 3 * index) % 250 for index in range(self.num_answers)]
        return [STOP if index == self.stops_at else token for index, token in enumerate(tokens)]


options = st.builds(
    Options,
    salt=st.sampled_from([None, None, None, "a", "b"]),
    adapter=st.sampled_from([0, 0, 0, 0, 1, 2]),
    priority=st.integers(0, 2),
    grammar=st.sampled_from([False, False, False, True]),
    seeds=st.sampled_from([(0,), (0,), (0,), (1,), (0, 1), (0, 0, 2)]),
    num_answers=st.sampled_from([1, 3, 10, MAX_ANSWERS]),
    stops_at=st.sampled_from([99, 99, 0, 3]),
    session=st.sampled_from([None, None, "a", "b"]),
    retention=st.sampled_from([None, None, None, "low", "high", "normal", "each"]),
)


stars = st.sampled_from([None, 0, 0, 0, 1])
"""Which of the run's sizes a request's plan has; None: it is dense."""

asked = st.tuples(prompts, options, stars)


def part(name: str, plan: StarPlan, first: int, num_blocks: int) -> tuple[int, RequestMetadata] | None:
    """Where a part of a prompt ends that a replica prefills for another one; None: the prompt has no such part."""
    start = first * plan.block_size
    stop = min(start + num_blocks * plan.block_size, plan.context_end // PAGE_SIZE * PAGE_SIZE)
    if (len(plan.starts) < 2) or stop <= max(start, plan.anchor_size):
        return None
    return stop, RequestMetadata(plan=plan, part=PromptPart(name, start, plan.anchor_size))


def fetching(plan: StarPlan) -> RequestMetadata:
    """Fetch all blocks but the first from two replicas, whose pages are numbered as the prompt's pages."""
    first, stop = plan.block_size // PAGE_SIZE, plan.context_end // PAGE_SIZE
    middle = (first + stop) // 2
    sources = [
        PageSource(a * PAGE_SIZE, list(range(a, b)), [], 1) for a, b in ((first, middle), (middle, stop)) if a < b
    ]
    metadata = RequestMetadata(plan=replace(plan, replicas=2))
    return replace(metadata, fetch=PageFetch(tuple(sources))) if sources else metadata
