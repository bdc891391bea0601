"""Sends each prompt under each plan, dense first, and returns the answers. Usable as a library."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from starling.lab.evaluation.answers import Completion, ServerError, naming
from starling.lab.evaluation.client import Client
from starling.lab.evaluation.prompt_options import DENSE, Plan, with_dense
from starling.lab.evaluation.prompts import Prompt
from starling.lab.evaluation.store import Answer, Store, answer_key

PLAN_NUMBERS = {
    "block_size": "star_block_size",
    "anchor_size": "star_anchor_size",
    "overlap_size": "star_overlap_size",
    "dense_heads": "star_dense_heads",
}
"""Fields of the server's plan, and the options that ask for exactly these numbers."""
KEPT = ("star_segments", "star_adapter")
"""Options of a plan that a longer prompt has too."""

SAME = (*PLAN_NUMBERS, "context_end", "adapter")
"""Fields of a server's plan that a longer prompt has too."""


class Memory:
    """Answers that are kept in memory alone."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}

    def add(self, answer: Answer) -> None:
        self.answers[answer.key] = answer


def key_of(prompt: Prompt, plan: Plan, model: str, num_logprobs: int) -> str:
    """Return the key of an answer, made of everything that the request for it has."""
    scored = [num_logprobs, *prompt.answer_ids[:num_logprobs]]
    return answer_key(model, plan.options, prompt.token_ids, prompt.max_tokens, scored)


async def evaluate(
    prompts: Sequence[Prompt],
    plans: Iterable[Plan],
    server: Client,
    *,
    num_logprobs: int = 0,
    concurrency: int = 1,
    store: Store | Memory | None = None,
    on_answer: Callable[[Answer], object] = lambda answer: None,
) -> list[Answer]:
    """Return the answers of all prompts under dense and all other plans.

    Args:
        plans: plans to measure; dense is measured in any case.
        num_logprobs: tokens of the answer at which the distributions are compared, or 0 for none.
        concurrency: prompts at the same time. The plans of one prompt follow one another.
        store: has the answers of an earlier run, and gets each new one.
        on_answer: function called after each new answer.

    Returns:
        For each prompt, the answers in the order of the plans, dense first.

    Raises:
        ServerError: a request failed, or a star plan did not engage. Requests that run are cancelled.
    """
    kept, all_plans, model = store or Memory(), with_dense(plans), (await server.facts()).model
    places = asyncio.Semaphore(concurrency)

    async def answers_of(prompt: Prompt) -> list[Answer]:
        answers: list[Answer] = []
        async with places:
            for plan in all_plans:
                key = key_of(prompt, plan, model, num_logprobs)
                if key not in kept.answers:
                    dense = answers[0] if answers else None
                    with naming(prompt.name):
                        answer = await ask(server, prompt, plan, key, num_logprobs, dense)
                    kept.add(answer)
                    on_answer(answer)
                # Prompts with equal tokens share an answer, and so do plans with equal options.
                answers.append(kept.answers[key].model_copy(update={"prompt": prompt.name, "plan": plan.name}))
        return answers

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answers_of(prompt)) for prompt in prompts]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [answer for task in tasks for answer in task.result()]


async def ask(server: Client, prompt: Prompt, plan: Plan, key: str, num_logprobs: int, dense: Answer | None) -> Answer:
    """Return one answer; with ``num_logprobs``, also the distributions along the reference answer or else dense's.

    Nothing is generated that is not compared: no text of a prompt with ``max_tokens`` 0 whose answer is known.

    Args:
        dense: dense's answer to the prompt; None for dense itself.
    """
    output, followed = None, prompt.answer_ids or (dense.token_ids if dense else None)
    if prompt.max_tokens or not followed:
        output = await server.complete(prompt.token_ids, plan, prompt.max_tokens or num_logprobs)
        followed = followed or output.token_ids
    scored: list[Completion] = []
    if num_logprobs:
        if followed is None:
            raise ServerError("--logprobs needs a server that returns token ids (return_token_ids): a vLLM server")
        scored = await score_tokens(server, prompt.token_ids, plan, followed[:num_logprobs], output)
        output = output or scored[0]
    assert output is not None
    return Answer(
        key=key,
        prompt=prompt.name,
        plan=plan.name,
        text=output.text,
        finish_reason=output.finish_reason,
        token_ids=output.token_ids,
        server_plan=output.plan,
        scores=[completion.score for completion in scored if completion.score is not None],
    )


async def score_tokens(
    server: Client, token_ids: Sequence[int], plan: Plan, followed: Sequence[int], output: Completion | None = None
) -> list[Completion]:
    """Return the log-probabilities at each token of an answer.

    The first request computes the prompt, and the others, all at once, find it in the prefix cache.

    Args:
        token_ids: tokens of the prompt.
        followed: the tokens of the answer.
        output: output of the same prompt and plan, or None if none was asked for.

    Raises:
        ServerError: a request failed, or the server changed the plan for a longer prompt.
    """

    async def score(position: int, output: Completion | None) -> Completion:
        ids = [*token_ids, *followed[:position]]
        same = plan if output is None else same_plan(plan, output.plan, len(ids))
        found = await server.score_token(ids, same, followed[position])
        check_same_plan(plan, (output or found).plan, found.plan)
        return found

    if not followed:
        return []
    first = await score(0, output)
    return [first, *await asyncio.gather(*(score(place, output or first) for place in range(1, len(followed))))]


def same_plan(plan: Plan, server_plan: dict[str, Any] | None, num_tokens: int) -> Plan:
    """Return the plan with the server's exact numbers, to stay the same for a prompt with more tokens at its end.

    n/8, for example, would cut a longer prompt into larger blocks, and the query would begin later.

    Args:
        num_tokens: length of the longer prompt.
    """
    if plan.is_dense or server_plan is None:
        return DENSE
    numbers = {option: server_plan[field] for field, option in PLAN_NUMBERS.items()}
    kept = {name: value for name, value in plan.options.items() if name in KEPT}
    query = {"star_query_tokens": num_tokens - int(server_plan["context_end"])}
    return Plan(plan.name, {"star": "on"} | numbers | query | kept)


def check_same_plan(plan: Plan, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
    """Refuse (ServerError) log-probabilities that belong to another plan than the answer."""
    differ = [field for field in SAME if (before or {}).get(field) != (after or {}).get(field)]
    if differ:
        raise ServerError(f"plan={plan.name!r}: the server changed {', '.join(differ)} for a longer prompt")
