"""The search: all candidates on few prompts, fewer candidates on more, and the one that is left on other prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from starling.config.star import flat_name
from starling.lab.evaluation.answers import ServerError
from starling.lab.evaluation.client import Client
from starling.lab.evaluation.comparison import make_pairs
from starling.lab.evaluation.plans import DENSE, Plan, parse_plan
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.runner import Memory, evaluate, key_of
from starling.lab.evaluation.store import Answer, Store
from starling.lab.evaluation.tuning.candidates import Candidate
from starling.lab.evaluation.tuning.search_options import Measure
from starling.lab.statistics import lower_bound, upper_bound
from starling.scheduler.star.counts import summary

FIRST_ROUND = 8  # prompts
COMPARED = ("block_size", "anchor_size", "overlap_size", "context_end", "dense_heads")


def halves(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to search with, and those to confirm with, each in the order in which it is measured.

    A prompt's place depends on the hash of its tokens, not on its place in a file. Tasks and lengths take turns, so
    that each start of the order has about equally many of each, and both halves do.
    """
    cells: dict[tuple[str, int | None], list[Prompt]] = {}
    for prompt in sorted(prompts, key=lambda prompt: hashlib.sha256(json.dumps(prompt.token_ids).encode()).digest()):
        cells.setdefault((prompt.task, prompt.length), []).append(prompt)
    dealt: list[list[tuple[int, Prompt]]] = [[], []]
    number = 0
    for key in sorted(cells, key=lambda key: (key[0], key[1] or 0)):
        for index, prompt in enumerate(cells[key]):
            dealt[number % 2].append((index, prompt))
            number += 1
    search, held_out = ([prompt for _, prompt in sorted(half, key=lambda item: item[0])] for half in dealt)
    return search, held_out


def measured_plans(held_out: Sequence[Prompt], store: Store, model: str, num_logprobs: int) -> list[str]:
    """The star plans, by name, under which a held-out prompt has been measured before."""
    plans = {answer.plan: None for answer in store.answers.values() if answer.plan != DENSE.name}
    return [
        plan.name
        for plan in map(parse_plan, plans)
        if any(key_of(prompt, plan, model, num_logprobs) in store.answers for prompt in held_out)
    ]


def rounds(count: int) -> list[int]:
    """How many prompts each round has measured at its end: twice as many as the one before, ``count`` at last."""
    sizes = []
    size = FIRST_ROUND
    while size < count:
        sizes.append(size)
        size *= 2
    return [*sizes, count]


def why_dropped(
    losses: Sequence[float], cheaper: Mapping[str, Sequence[float]], measure: Measure, budget: float
) -> str | None:
    """Why a candidate can't be the result; None where it can.

    Args:
        losses: of the candidate, of the prompts so far.
        cheaper: plan -> losses of the same prompts, of the candidates that cost no more.
    """
    low = lower_bound(losses, measure.assumed_best(losses))
    if low > budget:
        return f"it loses at least {100 * low:.1f}"
    for plan, others in cheaper.items():
        more = [mine - other for mine, other in zip(losses, others, strict=True)]
        best = -measure.worst if measure.worst is not None else -max(map(abs, more))
        gap = lower_bound(more, best)
        if gap > 0:
            return f"{plan} costs no more and loses at least {100 * gap:.1f} less"
    return None


@dataclass
class Trial:
    """What is known of a candidate.

    Attributes:
        losses: of the first prompts of the search half.
        dropped_after: the prompts after which it was dropped; None where it was not.
        reason: why.
    """

    candidate: Candidate
    losses: list[float] = field(default_factory=list)
    dropped_after: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Attributes:
        trials: of all candidates, the cheapest first.
        chosen: the cheapest one whose upper bound is within the budget on the search half; None: there is none.
        held_out: its losses on the held-out half.
    """

    trials: list[Trial]
    chosen: Trial | None
    held_out: list[float]


@dataclass(frozen=True)
class Tuner:
    """Measures losses on one server.

    Attributes:
        num_logprobs: tokens of an answer at which the distributions are compared; 0: none.
        concurrency: prompts at the same time.
        store: has the answers of an earlier run, and gets each new one.
        on_answer: called after each new answer.
    """

    server: Client
    measure: Measure
    num_logprobs: int
    concurrency: int
    store: Store | Memory
    on_answer: Callable[[Answer], object] = lambda answer: None

    def upper(self, losses: Sequence[float]) -> float:
        return upper_bound(losses, self.measure.assumed_worst(losses))

    async def search(
        self,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
        candidates: Sequence[Candidate],
        budget: float,
        on_round: Callable[[Sequence[Trial]], object] = lambda trials: None,
    ) -> Tuning:
        """Find the cheapest candidate on ``prompts``, and measure it on ``held_out``.

        A round measures the candidates that are left, the cheapest first, and ends at the first one that is within the
        budget: those behind it cost more. They come back in a later round if that candidate is within the budget no
        more.

        Args:
            budget: of the mean loss.
            on_round: called before each round, with the candidates that are left.

        Raises:
            ServerError: a request failed, or the server's plan is not that of the candidate.
        """
        trials = [Trial(candidate) for candidate in candidates]
        chosen = None
        for number in rounds(len(prompts)):
            left = [trial for trial in trials if trial.dropped_after is None]
            on_round(left)
            chosen = await self._round(prompts[:number], left, budget)
            if all(trial.dropped_after is not None for trial in left):
                break
        losses = [] if chosen is None else await self.losses(held_out, chosen.candidate)
        return Tuning(trials, chosen, losses)

    async def _round(self, prompts: Sequence[Prompt], left: Sequence[Trial], budget: float) -> Trial | None:
        """Measure up to the cheapest candidate that is within the budget; returns it."""
        cheaper: dict[str, list[float]] = {}
        for trial in left:
            trial.losses += await self.losses(prompts[len(trial.losses) :], trial.candidate)
            reason = why_dropped(trial.losses, cheaper, self.measure, budget)
            if reason is not None:
                trial.dropped_after, trial.reason = len(prompts), reason
            elif self.upper(trial.losses) <= budget:
                return trial
            cheaper[trial.candidate.plan.name] = trial.losses
        return None

    async def losses(self, prompts: Sequence[Prompt], candidate: Candidate) -> list[float]:
        """The loss of each prompt under a candidate.

        Raises:
            ServerError: a request failed, or the server's plan is not that of the candidate.
        """
        answers = await evaluate(
            prompts,
            [candidate.plan],
            self.server,
            num_logprobs=self.num_logprobs,
            concurrency=self.concurrency,
            store=self.store,
            on_answer=self.on_answer,
        )
        pairs = [pair for pair in make_pairs(prompts, answers) if pair.answer.plan == candidate.plan.name]
        if [pair.prompt for pair in pairs] != list(prompts):
            raise ValueError(f"plan={candidate.plan.name!r} has {len(pairs)} answers to {len(prompts)} prompts")
        for pair in pairs:
            check_numbers(pair.answer, candidate)
            if self.num_logprobs and not pair.answer.scores:
                raise ServerError(f"the answer to {pair.prompt.name} has no token that could be compared")
        return [self.measure.loss(pair) for pair in pairs]


def check_numbers(answer: Answer, candidate: Candidate) -> None:
    """Refuse (ServerError) an answer under another plan than a server with the candidate's options would make."""
    expected, found = summary(candidate.numbers[answer.prompt]), answer.server_plan or {}
    for name in (*COMPARED, "prompt_tokens"):
        if found.get(name) != expected[name]:
            raise ServerError(
                f"plan={answer.plan!r} has {name} {found.get(name)} on the prompt {answer.prompt}, and not "
                f"{expected[name]}: the server's own star options or its replicas change it, or the folder has answers "
                "of a server with another --block-size. Start a server without star options, and with one replica, or "
                "name another --out"
            )


async def find_engine(server: Client, prompts: Sequence[Prompt]) -> tuple[int, int]:
    """Tokens of a KV page of the server, and the KV heads of its model where it can make some of them dense, else 0.

    Star blocks that are as small as possible have one page.

    Raises:
        ServerError: a request failed; also where Starling is not activated, or the longest prompt is too short.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids)).token_ids
    smallest = Plan(f"n/{len(longest)}", {"star": "on", "star_block_size": f"n/{len(longest)}"})
    answer = await server.complete(longest, smallest, 1)
    if answer.plan is None:
        raise ServerError("the server does not say which plan a prompt got: `starling tune` needs Starling")
    heads = flat_name("dense_heads")
    try:
        with_heads = await server.complete(longest, Plan(f"{smallest.name},H=1", smallest.options | {heads: 1}), 1)
    except ServerError as error:
        if heads not in str(error):
            raise
        return int(answer.plan["block_size"]), 0
    return int(answer.plan["block_size"]), int((with_heads.plan or {}).get("kv_heads", 0))
