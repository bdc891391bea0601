"""Scores of KV heads without gradients: from a server's answers, while more and more heads become dense.

The heads are put in a random order and cut into groups. With the first groups dense, a prompt diverges from the dense
model by less and less. What a group takes away is the sum of its heads' scores. Several orders, each with other groups,
give more such sums than there are heads that matter, and the scores, none below 0, that come closest to them are found
by least squares. A server reads its order of heads when it starts, so each order is a start.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from starling.config.head_scores import HeadScores
from starling.lab.calibration.gated_model import ANSWER_TOKENS, ScoredPrompt
from starling.lab.evaluation.answers import naming
from starling.lab.evaluation.client import Client, refuse_key
from starling.lab.evaluation.commands.measuring import SERVE_KEY_ENV
from starling.lab.evaluation.plans import DENSE, Plan
from starling.lab.evaluation.runner import score_tokens
from starling.lab.evaluation.server_process import served
from starling.lab.models import ModelError
from starling.lab.statistics import kl_divergence

SWEEPS, RIDGE = 200, 0.1
SECONDS = 3600.0  # that an answer may take: a large model's first may wait for its compilation

Head = tuple[int, int]
"""A layer, and a KV head of it."""


def random_orders(heads: Sequence[Head], orders: int) -> list[list[Head]]:
    """Return ``orders`` random orders of the heads, the same in each run."""
    return [Random(number).sample(heads, len(heads)) for number in range(orders)]


def group_counts(num_heads: int, groups: int) -> list[int]:
    """Return how many heads the first groups of an order have together: from 0 to all of them, in equal steps."""
    groups = min(groups, num_heads)
    return [num_heads * number // groups for number in range(groups + 1)]


def fitted_scores(
    orders: Sequence[Sequence[Head]], counts: Sequence[int], divergences: Sequence[Sequence[float]]
) -> dict[Head, float]:
    """Return the score of each head, at least 0, by least squares with a small ridge.

    The ridge gives equal scores to heads that no order tells apart.

    Args:
        orders: orders of the heads.
        counts: numbers of an order's first heads that were dense.
        divergences: for each order, a divergence from the dense model for each of ``counts``.
    """
    heads = sorted(orders[0])
    place = {head: number for number, head in enumerate(heads)}
    members = np.zeros((len(orders) * (len(counts) - 1), len(heads)))
    groups = ([place[head] for head in order[first:stop]] for order in orders for first, stop in pairwise(counts))
    for row, group in zip(members, groups, strict=True):
        row[group] = 1
    left = -np.diff(np.asarray(divergences, dtype=np.float64)).flatten()
    scores = np.zeros(len(heads))
    for _ in range(SWEEPS):
        for head, column in enumerate(members.T):
            times = column.sum()
            score = max(0.0, (column @ left + times * scores[head]) / (times + RIDGE))
            left -= column * (score - scores[head])
            scores[head] = score
    return dict(zip(heads, scores.tolist(), strict=True))


@contextmanager
def served_order(
    model: str, scores: HeadScores, blocks: int, query_tokens: int, counts: Sequence[int], options: list[str], log: Path
) -> Iterator[Callable[[ScoredPrompt], list[float]]]:
    """Serve a model with its heads in the order of ``scores``, and yield a function that measures a prompt.

    The function returns a prompt's mean KL divergence from the dense model, in nats, at the first tokens of its answer,
    for each of ``counts``. It raises ServerError.

    Args:
        blocks: star blocks that a prompt is cut into, with the server's default anchor and overlap.
        query_tokens: tokens of the prompt's end, which see the whole prompt.
        counts: numbers of the first heads that are dense.
        options: more options of `starling serve`.
        log: file for the output of the server.

    Raises:
        ValueError, StartError: the same as ``served``.
    """
    key = os.environ.get(SERVE_KEY_ENV)
    refuse_key(key or "", SERVE_KEY_ENV)
    with tempfile.TemporaryDirectory(prefix="starling-calibrate-") as folder, asyncio.Runner() as runner:
        path = Path(folder) / "scores.json"
        path.write_text(scores.model_dump_json(), encoding="utf-8")
        with served(model, [*options, "--star-heads", str(path)], log) as url:
            client = Client(url, api_key=key, timeout=SECONDS)

            def measured(prompt: ScoredPrompt) -> list[float]:
                with naming(prompt.name):
                    return runner.run(divergences(client, prompt, blocks, query_tokens, counts, scores.num_heads))

            try:
                yield measured
            finally:
                runner.run(client.__aexit__())


async def divergences(
    client: Client, prompt: ScoredPrompt, blocks: int, query_tokens: int, counts: Sequence[int], num_heads: int
) -> list[float]:
    """Return a prompt's divergences from the dense model, as ``served_order`` says (raises ServerError)."""
    ids = list(prompt.token_ids)
    answer = list(prompt.answer_ids) or (await client.complete(ids, DENSE, ANSWER_TOKENS)).token_ids
    if not answer:
        raise ModelError("the model gives no answer")
    options: dict[str, str | int] = {
        "star": "on",
        "star_block_size": f"n/{blocks}",
        "star_query_tokens": query_tokens,
    }

    async def top(plan: Plan) -> list[dict[int, float]]:
        """Return the most probable tokens at each place of the answer."""
        scored = await score_tokens(client, ids, plan, answer[:ANSWER_TOKENS])
        refuse_other_sizes(plan, scored[0].plan or {}, len(ids), blocks)
        return [one.score.top for one in scored if one.score is not None]

    def with_dense_heads(count: int) -> Plan:
        return Plan(f"{count} dense heads", options | {"star_dense_heads": f"{count / num_heads:.6f}"})

    dense, found = await top(DENSE), []
    for count in counts:
        pairs = zip(dense, await top(with_dense_heads(count)), strict=True)
        found.append(float(np.mean([kl_divergence(one, other) for one, other in pairs])))
    return found


def refuse_other_sizes(plan: Plan, server_plan: dict[str, Any], num_tokens: int, blocks: int) -> None:
    """Refuse (ModelError) blocks without an overlap, as the server makes them where its pages are too large."""
    if not plan.is_dense and not server_plan.get("overlap_size"):
        raise ModelError(
            f"n/{blocks} of {num_tokens} tokens is refused: the server's KV pages are too large for it, so that its "
            f"blocks of {server_plan.get('block_size')} tokens have no overlap. Allowed: longer --lengths, fewer "
            "--blocks, or the server's --block-size 32"
        )
