"""Scores, and their differences to dense with intervals: for each task, length, plan and depth, and over all tasks."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from starling.lab.evaluation.prompt_options import DENSE
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.store import Answer, TokenScore
from starling.lab.evaluation.tasks import Match
from starling.lab.statistics import Interval, bootstrap, kl_divergence, mean_of_means

ALL = "all"
THIRDS = ("0-33 %", "33-66 %", "66-100 %")


def score(output: str, references: Sequence[str], match: Match) -> float:
    """Score an output, from 0 to 1. Case and white space do not matter.

    Args:
        references: at least one reference.
        match: ``all`` (RULER's string_match_all): the share of the references that the output contains; ``any``
            (string_match_part): 1 if it contains one of them.
    """
    text = normalise(output)
    found = [normalise(reference) in text for reference in references]
    return sum(found) / len(found) if match == "all" else float(any(found))


def normalise(text: str) -> str:
    """Return the text in lower case, composed (NFC), with one space for each run of white space."""
    return " ".join(unicodedata.normalize("NFC", text.lower()).split())


class StarSizes(BaseModel):
    """Sizes of star plans in tokens: (smallest, largest) over prompts, which have different ones with n/8."""

    model_config = ConfigDict(frozen=True)

    block_size: tuple[int, int]
    anchor_size: tuple[int, int]
    overlap_size: tuple[int, int]

    def __str__(self) -> str:
        ranges = zip("BAO", (self.block_size, self.anchor_size, self.overlap_size), strict=True)
        return ", ".join(f"{letter} {low}" + (f"-{high}" if high > low else "") for letter, (low, high) in ranges)


class Cell(BaseModel):
    """One plan on the prompts of one task and length, or on all of them.

    Attributes:
        task: ``all`` for the mean over the tasks and lengths, each with equal weight. Its ``attended_keys`` is the
            mean over prompts, and its ``top1_agreement`` and ``kl`` are means over positions, whatever task has them.
        length: None over all lengths, and for the user's own prompts.
        depth: one of THIRDS, where the prompt's fact begins: 0 % is the beginning of the text; or None for anywhere.
        prompts: number of prompts.
        sizes: sizes that the server reports; None for dense, and where the server does not say.
        against_reference: True if outputs are scored against references; else against dense's outputs.
        dense_score, score: means, from 0 to 1.
        difference: paired difference of score and dense_score; None for dense.
        same_as_dense: the share of outputs that equal dense's.
        attended_keys: query-key pairs of the prefill, as a share of dense's; None without Starling.
        logprob_difference: difference to dense of the answer's tokens, in nats for each token; None without
            --logprobs.
        top1_agreement: the share of positions where the most probable token is dense's.
        kl: Kullback-Leibler divergence from dense, in nats, the mean over all positions of all prompts; a lower bound
            (``kl_divergence``).
    """

    model_config = ConfigDict(frozen=True)

    task: str
    length: int | None
    depth: str | None = None
    plan: str
    sizes: StarSizes | None = None
    prompts: int
    against_reference: bool
    dense_score: float
    score: float
    difference: Interval | None
    same_as_dense: float
    attended_keys: float | None
    logprob_difference: Interval | None
    top1_agreement: float | None
    kl: float | None


@dataclass(frozen=True)
class Pair:
    """A prompt's answer under a plan beside dense's."""

    prompt: Prompt
    dense: Answer
    answer: Answer

    @property
    def dense_score(self) -> float:
        return answer_score(self.prompt, self.dense, self.dense)

    @property
    def score(self) -> float:
        return answer_score(self.prompt, self.answer, self.dense)

    @property
    def difference(self) -> float:
        return self.score - self.dense_score

    @property
    def same(self) -> bool:
        return self.answer.text == self.dense.text

    @property
    def positions(self) -> list[tuple[TokenScore, TokenScore]]:
        """Return the distributions of dense and of the plan at each position of the answer that was compared."""
        return list(zip(self.dense.scores, self.answer.scores, strict=True))


def answer_score(prompt: Prompt, answer: Answer, dense: Answer) -> float:
    """Return RULER's score where the prompt has references; else 1 if the output equals dense's, and 0 if not."""
    if not prompt.references:
        return float(answer.text == dense.text)
    return score(answer.text, prompt.references, prompt.match)


def make_pairs(prompts: Iterable[Prompt], answers: Iterable[Answer]) -> list[Pair]:
    """Return each answer of each plan, dense too, beside dense's answer to the same prompt."""
    of_name = {prompt.name: prompt for prompt in prompts}
    listed = list(answers)
    dense = {answer.prompt: answer for answer in listed if answer.plan == DENSE.name}
    return [Pair(of_name[answer.prompt], dense[answer.prompt], answer) for answer in listed]


def compare(pairs: Sequence[Pair]) -> list[Cell]:
    """Return a cell for each task, length and plan, and one over all tasks and lengths for each plan.

    The cells over all tasks weigh each task and length equally, except where ``Cell`` says otherwise. With more than
    one plan, there are no cells for dense: its score is in the others.
    """
    groups: dict[tuple[str, int | None, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.prompt.task, pair.prompt.length, pair.answer.plan), []).append(pair)
    plans = list(dict.fromkeys(plan for *_, plan in groups))
    shown = [plan for plan in plans if plan != DENSE.name] or plans
    cells = [make_cell(*key, [group]) for key, group in groups.items() if key[2] in shown]
    for plan in shown:
        for with_references in (True, False):
            of_plan = [
                group
                for (*_, name), group in groups.items()
                if name == plan and bool(group[0].prompt.references) == with_references
            ]
            if len(of_plan) > 1:
                cells.append(make_cell(ALL, None, plan, of_plan))
    return cells


def make_cell(task: str, length: int | None, plan: str, groups: Sequence[Sequence[Pair]]) -> Cell:
    """Make the cell of a plan over groups of prompts, each with the same weight in scores and log-probabilities."""
    scored = [[pair for pair in group if pair.answer.scores and pair.dense.scores] for group in groups]
    has_scores = all(scored)
    pairs = [pair for group in groups for pair in group]
    positions = [both for group in scored for pair in group for both in pair.positions]
    is_dense = plan == DENSE.name
    keys = [key_share(pair.answer) for pair in pairs]
    return Cell(
        task=task,
        length=length,
        plan=plan,
        sizes=star_sizes([pair.answer for pair in pairs]),
        prompts=len(pairs),
        against_reference=bool(pairs[0].prompt.references),
        dense_score=mean_of_means([[pair.dense_score for pair in group] for group in groups]),
        score=mean_of_means([[pair.score for pair in group] for group in groups]),
        difference=None if is_dense else bootstrap([[pair.difference for pair in group] for group in groups]),
        same_as_dense=mean_of_means([[float(pair.same) for pair in group] for group in groups]),
        attended_keys=None if None in keys else float(np.mean([key for key in keys if key is not None])),
        logprob_difference=(
            bootstrap([[logprob_difference(pair) for pair in group] for group in scored])
            if has_scores and not is_dense
            else None
        ),
        top1_agreement=float(np.mean([top(one) == top(two) for one, two in positions])) if has_scores else None,
        kl=float(np.mean([kl_divergence(one.top, two.top) for one, two in positions])) if has_scores else None,
    )


def logprob_difference(pair: Pair) -> float:
    """Return how much more probable the answer's tokens are than under dense, in nats for each token."""
    return float(np.mean([two.logprob - one.logprob for one, two in pair.positions]))


def top(position: TokenScore) -> int:
    """Return the most probable token."""
    return max(position.top, key=lambda token: position.top[token])


def star_sizes(answers: Sequence[Answer]) -> StarSizes | None:
    """Return the sizes under which the prompts ran, or None where the server does not say it of each."""
    plans, names = [answer.server_plan or {} for answer in answers], tuple(StarSizes.model_fields)
    if not all(name in plan for plan in plans for name in names):
        return None
    found = {name: [int(plan[name]) for plan in plans] for name in names}
    return StarSizes(**{name: (min(sizes), max(sizes)) for name, sizes in found.items()})


def key_share(answer: Answer) -> float | None:
    """Return the query-key pairs of the prefill, as a share of dense's, or None where the server does not say."""
    plan = answer.server_plan
    if plan is None:
        return None
    return 1.0 if plan["attention"] == "dense" else plan["keys_attended"] / plan["dense_keys"]


def compare_depths(pairs: Sequence[Pair]) -> list[Cell]:
    """Return a cell for each length, star plan and third of the text in which a fact begins.

    The cells are over the prompts of all tasks that have a depth, each prompt with equal weight; there are none where
    no prompt has one.
    """
    groups: dict[tuple[int | None, str], list[list[Pair]]] = {}
    for pair in pairs:
        if pair.prompt.depth is not None and pair.answer.plan != DENSE.name:
            thirds = groups.setdefault((pair.prompt.length, pair.answer.plan), [[] for _ in THIRDS])
            thirds[third(pair.prompt.depth)].append(pair)
    return [
        make_cell(ALL, length, plan, [group]).model_copy(update={"depth": name})
        for (length, plan), thirds in groups.items()
        for name, group in zip(THIRDS, thirds, strict=True)
        if group
    ]


def third(depth: float) -> int:
    """Return the index in THIRDS of a depth from 0 to 1."""
    return min(int(depth * len(THIRDS)), len(THIRDS) - 1)
