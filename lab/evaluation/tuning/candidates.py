"""The plans that are tried, and what each of them is for each prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starling.config.head_scores import HeadScores
from starling.config.parsing import OptionError
from starling.config.star import PREFIX, flat_name, parse_options
from starling.lab.evaluation.plans import Plan, parse_plan
from starling.lab.evaluation.prompts import Prompt
from starling.scheduler.star.counts import dense_keys, keys_attended
from starling.scheduler.star.decide import decide
from starling.scheduler.star.facts import EngineFacts, PromptFacts
from starling.scheduler.star.plan import StarPlan

NO_DEFAULTS = parse_options({})
BLOCKS = (3, 4, 8, 16)
"""Into how many star blocks the default candidates cut a prompt. With A + O = B, two blocks attend to all that dense
attends to."""
SHARES = {8: (0, 0.05, 0.1, 0.2), 16: (0, 0.05, 0.1, 0.2)}
"""For some of these numbers, the shares of dense heads that are tried on a server with the scores of its model's heads;
for the others 0."""


@dataclass(frozen=True)
class Candidate:
    """A plan that may be the result.

    Attributes:
        cost: query-key pairs of the prefill as a share of dense's, the mean over all prompts.
        numbers: a plan for each prompt.
    """

    plan: Plan
    cost: float
    numbers: dict[str, StarPlan]


def served_options(plan: Plan, min_tokens: int) -> dict[str, Any]:
    """The server's star options with which its requests get this plan.

    Args:
        min_tokens: shorter prompts stay dense: no shorter one was measured.
    """
    given = {name: value for name, value in plan.options.items() if name != PREFIX}
    return {PREFIX: "auto", flat_name("min_tokens"): min_tokens} | given


def make_candidate(plan: Plan, prompts: Sequence[Prompt], page_size: int, kv_heads: int = 0) -> Candidate:
    """The candidate of a plan.

    Args:
        kv_heads: of the server's model, where it has their scores; else 0.

    Raises:
        ValueError: a prompt can't have this plan or is dense with it, or it would get another one from a server with
            these options.
    """
    if flat_name("segments") in plan.options:
        reason = "prompts of documents have costs of their own"
        raise ValueError(f"plan={plan.name!r} is refused: {reason}. Allowed: plans without S=.")
    request, server = parse_options(plan.options), parse_options(served_options(plan, 0))
    # Which heads are dense is the server's to say: the cost depends on their number alone.
    scores = HeadScores(scores=((0.0,) * kv_heads,)) if kv_heads else None
    engine = EngineFacts(page_size, find_heads=lambda: scores)
    numbers: dict[str, StarPlan] = {}
    for prompt in prompts:
        length = len(prompt.token_ids)
        facts = PromptFacts(length, list(prompt.token_ids))

        def refused(reason: str, prompt: Prompt = prompt, length: int = length) -> ValueError:
            return ValueError(f"plan={plan.name!r} is refused: the prompt {prompt.name}, of {length} tokens, {reason}")

        try:
            one = decide(NO_DEFAULTS, request, facts, engine).plan
            default = decide(server, None, facts, engine).plan
        except OptionError as error:
            raise refused(f"can't have it: {error}") from None
        if one is None:
            raise refused("would be dense with it: its context fits in one star block")
        if one != default:
            raise refused("would get another plan from a server with these options: a default query is at most half")
        numbers[prompt.name] = one
    cost = sum(keys_attended(one) / dense_keys(one.num_prompt_tokens) for one in numbers.values()) / len(numbers)
    if cost >= 1:
        raise ValueError(f"plan={plan.name!r} is refused: it attends to all keys that dense attends to")
    return Candidate(plan, cost, numbers)


def chosen_candidates(
    texts: Sequence[str], prompts: Sequence[Prompt], page_size: int, kv_heads: int = 0, *, leave_out: bool = False
) -> list[Candidate]:
    """The candidates of --plan, the cheapest first; of equal ones, the one that was made first.

    Args:
        leave_out: those that can't be used.

    Raises:
        ValueError: a candidate can't be used; with ``leave_out``, none can.
    """
    found = []
    for text in texts:
        with contextlib.suppress(ValueError) if leave_out else contextlib.nullcontext():
            found.append(make_candidate(parse_plan(text), prompts, page_size, kv_heads))
    if not found:
        shortest = min(prompts, key=lambda prompt: len(prompt.token_ids))
        raise ValueError(
            f"the prompts are too short for star blocks of whole pages: {shortest.name} has {len(shortest.token_ids)} "
            f"tokens, and a page {page_size}. Allowed: longer prompts, a smaller --block-size of the server, or a "
            "smaller query"
        )
    return sorted(found, key=lambda candidate: round(candidate.cost, 12))


def default_candidates(
    prompts: Sequence[Prompt], page_size: int, query_tokens: int | None, kv_heads: int = 0
) -> list[Candidate]:
    """For each number of star blocks: the default anchor and overlap, halves of B, and the paper's A = B.

    These three attend to equally many keys. With scores, there are shares of dense heads beside the default anchor. The
    halves are numbers of tokens, so they are those of the shortest prompt. Combinations that its pages do not allow,
    and those that are equal to another one, are left out.

    Args:
        query_tokens: Q of all candidates; None: the default.
        kv_heads: of the server's model, where it has their scores; else 0.

    Raises:
        ValueError: the prompts are too short for any.
    """
    shortest = min(prompts, key=lambda prompt: len(prompt.token_ids))
    length = len(shortest.token_ids)
    query = "" if query_tokens is None else f",Q={query_tokens}"
    texts = []
    for number in BLOCKS:
        size = -(-length // (number * page_size)) * page_size
        half = size // page_size // 2 * page_size
        halves = [f",A={half},O={size - half}{',H=0' if kv_heads else ''}"] if half >= page_size else []
        heads = [f",H={share:g}" for share in SHARES.get(number, (0,))] if kv_heads else [""]
        if length >= number * page_size:
            texts += [f"n/{number}{text}{query}" for text in (*heads, *halves, ",O=0")]
    found: dict[tuple[StarPlan, ...], Candidate] = {}
    for candidate in chosen_candidates(texts, prompts, page_size, kv_heads, leave_out=True):
        found.setdefault(tuple(candidate.numbers.values()), candidate)
    return list(found.values())
